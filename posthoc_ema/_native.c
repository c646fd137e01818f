/* The inner loops over numbers, compiled: see native.py, which calls them through ctypes.

   Plain C: pointers and counts come in, numbers go out, nothing is allocated and nothing is kept,
   so that any number of threads may call. Where a function here has a twin in
   numpy (blocks.py, encoding.py, kernels.py), files written by either are the same byte for byte
   (but for the digits of measured rounding errors). */

#define _FILE_OFFSET_BITS 64     /* before all headers: files above 2 GB, */
#define _POSIX_C_SOURCE 200809L /* and pread */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(_WIN32)
#include <errno.h>
#include <unistd.h>
#endif
#if defined(_MSC_VER)
#include <intrin.h>
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define BLOCK 64  /* numbers that share a scale */
#define TILE 512  /* numbers worked on at once: what belongs to them stays in the first cache */
#define LERP_TILE 16384 /* the same for sums that need no memory of their own */
#define ROWS 8    /* files combined at once */
#define LANES 8   /* sums kept apart, so that they can be worked on together */

/* Types as native.py numbers them; block types are QUANTISED plus their bits. */
enum { F32 = 0, F16 = 1, BF16 = 2, QUANTISED = 64 };

static int64_t block_bytes(int bits) { return 2 + BLOCK * bits / 8; }

/* Byte at which a number is stored; of blocks, `place` is a multiple of 64. */
static int64_t byte_of(int type, int64_t place) {
  if (type >= QUANTISED) return place / BLOCK * block_bytes(type - QUANTISED);
  return place * (type == F32 ? 4 : 2);
}

static float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static float load_bfloat16(const uint8_t *bytes) {
  return float_of((uint32_t)bytes[1] << 24 | (uint32_t)bytes[0] << 16);
}

/* The next bfloat16 that is not smaller, as its bits: no code shall exceed the largest. */
static uint16_t bfloat16_above(float value) { return (uint16_t)((bits_of(value) + 0xFFFF) >> 16); }

static uint64_t load_word(const uint8_t *bytes) {
  uint64_t value;
  memcpy(&value, bytes, 8);
  return value;
}

/* XXH3, after its public specification; a test compares it with the library of its author. */
#define PIECE 65536 /* bytes that a digest has a hash of: digests.py */
static const uint64_t HASH_START[8] = {
    0x00000000C2B2AE3DU, 0x9E3779B185EBCA87U, 0xC2B2AE3D27D4EB4FU, 0x165667B19E3779F9U,
    0x85EBCA77C2B2AE63U, 0x0000000085EBCA77U, 0x27D4EB2F165667C5U, 0x000000009E3779B1U};
static const uint8_t HASH_KEY[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

/* Both halves of the product of 128 bits, added without carry. */
static uint64_t fold(uint64_t a, uint64_t b) {
  uint64_t a0 = a & 0xFFFFFFFF, a1 = a >> 32, b0 = b & 0xFFFFFFFF, b1 = b >> 32;
  uint64_t low = a0 * b0, left = a1 * b0, right = a0 * b1;
  uint64_t middle = (low >> 32) + (left & 0xFFFFFFFF) + right;
  uint64_t high = a1 * b1 + (left >> 32) + (middle >> 32);
  return high ^ (middle << 32 | (low & 0xFFFFFFFF));
}

static uint64_t hash_end(const uint64_t *lanes, int64_t size) {
  uint64_t value = (uint64_t)size * 0x9E3779B185EBCA87U;
  for (int i = 0; i < 8; i += 2)
    value += fold(lanes[i] ^ load_word(HASH_KEY + 11 + 8 * i),
                  lanes[i + 1] ^ load_word(HASH_KEY + 19 + 8 * i));
  value = (value ^ value >> 37) * 0x165667919E3779F9U;
  return value ^ value >> 32;
}

/* On x86 all loops exist twice: for any processor, and for those since 2013. */
#define WITH(name) name##_portable
#include "_native_loops.h"
#undef WITH

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#define WITH(name) name##_avx2
#define HAS_F16C
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "_native_loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef WITH
#define BEST(call)                                                                   \
  (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&                \
           __builtin_cpu_supports("f16c")                                            \
       ? call##_avx2                                                                 \
       : call##_portable)
#else
#define BEST(call) call##_portable
#endif

/* out[k] += sum_i coefficients[k, i] (stored_i - base), for all k.

   stored: `files` pointers to `count` numbers of `type`; a multiple of ROWS, filled up by repeating
   the first of a group with a coefficient of zero. base: `count` numbers, or NULL for zeros.
   coefficients: [targets, files]. out: `targets` rows of `count` numbers, `stride` apart. */
EXPORT void combine(int type, int64_t files, const uint8_t *const *stored, int64_t count,
                    const float *base, int64_t targets, const float *coefficients, double *out,
                    int64_t stride) {
  BEST(combine)(type, files, stored, count, base, targets, coefficients, files, out, stride);
}

/* out = total + base; whether all of it is finite. */
EXPORT int finish(const double *total, const float *base, int64_t count, float *out) {
  return BEST(finish)(total, base, count, out);
}

/* Stored numbers to floats. */
EXPORT void decode(int type, const uint8_t *stored, int64_t count, float *out) {
  BEST(decode)(type, stored, count, out);
}

/* Floats, less what was predicted, sum_i factors[i] rows[i], to stored numbers, rounded to the
   nearest. decoded (unless NULL) receives them as a reader finds them, the prediction added.
   Returns the sum of squared rounding errors. */
EXPORT double encode(int type, const float *values, int64_t number, const double *const *rows,
                     const double *factors, int64_t count, uint8_t *stored, double *decoded) {
  return BEST(encode)(type, values, number, rows, factors, count, stored, decoded);
}

/* Sum of squares and largest magnitude. */
EXPORT void measure(const float *values, int64_t count, double *square, float *largest) {
  BEST(measure)(values, count, square, largest);
}

/* Work on tensors in parts, for any number of threads: each takes the next that nobody has, so
   that one which begins late delays nobody. */
struct part {
  int64_t tensors;
  const uint8_t *const *sources; /* numbers of `type`, */
  const int64_t *counts;         /* how many, */
  float *const *averages;        /* where their averages of the first track begin, */
  const int64_t *strides;        /* and how far apart those of the tracks are */
};
struct parts {
  int64_t next, number; /* zero; how many there are */
  const struct part *list;
  int64_t type, tracks;
  const float *weights;
  int64_t infinite; /* zero */
};

static const struct part *take_part(struct parts *parts) {
#if defined(_MSC_VER)
  int64_t k = _InterlockedExchangeAdd64(&parts->next, 1);
#else
  int64_t k = __atomic_fetch_add(&parts->next, 1, __ATOMIC_RELAXED);
#endif
  return k < parts->number ? parts->list + k : NULL;
}

/* average[track] += weight[track] (source - average[track]) */
EXPORT void lerp_parts(struct parts *parts) {
  const struct part *p;
  while ((p = take_part(parts)))
    BEST(lerp)((int)parts->type, p->tensors, p->sources, p->counts, p->averages, p->strides,
               parts->tracks, parts->weights);
}

/* Sets `infinite` if a number is not finite. */
EXPORT void find_infinite(struct parts *parts) {
  const struct part *p;
  while ((p = take_part(parts)))
    if (!BEST(all_finite)((int)parts->type, p->tensors, p->sources, p->counts))
      parts->infinite = 1; /* all that a thread ever writes there */
}

/* XXH3 of each PIECE of some bytes, and of the rest, if there is one (of more than 240 bytes). */
EXPORT void hash_pieces(const uint8_t *data, int64_t size, uint64_t *hashes) {
  for (int64_t start = 0; start < size; start += PIECE)
    *hashes++ = BEST(hash)(data + start, size - start < PIECE ? size - start : PIECE);
}

static int read_range(int descriptor, int64_t offset, int64_t size, uint8_t *to) {
#if defined(_WIN32)
  return 0;
#else
  while (size > 0) {
    ssize_t got = pread(descriptor, to, (size_t)size, (off_t)offset);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return 0;
    offset += got, to += got, size -= got;
  }
  return 1;
#endif
}

/* Pieces of an open file, each [offset there, place in out, bytes]; whether all could be read. */
EXPORT int read_pieces(int descriptor, int64_t number, const int64_t *pieces, uint8_t *out) {
  for (const int64_t *piece = pieces; piece < pieces + 3 * number; piece += 3)
    if (!read_range(descriptor, piece[0], piece[2], out + piece[1])) return 0;
  return 1;
}

/* As combine, of open files of floats, a part at a time, which stays in the cache; whether all
   could be read.

   offsets: of the first number in each of `files` files. count: of numbers; they are read `together`
   at a time. coefficients: [targets, apart], as many as files and filled up with zeros to a multiple
   of ROWS. buffer: for `together` numbers of ROWS files. hashes: NULL, or [files, pieces] as of
   hash_pieces; then `together` numbers are whole pieces. */
EXPORT int combine_files(int type, int64_t files, const int64_t *descriptors,
                         const int64_t *offsets, int64_t count, int64_t together,
                         const float *base, int64_t targets, const float *coefficients,
                         int64_t apart, double *out, int64_t stride, uint8_t *buffer,
                         uint64_t *hashes) {
  int64_t room = byte_of(type, together);
  int64_t pieces = (byte_of(type, count) + PIECE - 1) / PIECE;
  for (int64_t start = 0; start < count; start += together) {
    int64_t n = count - start < together ? count - start : together;
    int64_t size = byte_of(type, n), skip = byte_of(type, start);
    for (int64_t i = 0; i < files; i += ROWS) {
      const uint8_t *rows[ROWS];
      for (int64_t j = 0; j < ROWS; j++) {
        rows[j] = i + j < files ? buffer + j * room : buffer; /* where there is none, zero times */
        if (i + j >= files) continue;
        if (!read_range((int)descriptors[i + j], offsets[i + j] + skip, size, buffer + j * room))
          return 0;
        if (hashes) hash_pieces(rows[j], size, hashes + (i + j) * pieces + skip / PIECE);
      }
      BEST(combine)(type, ROWS, rows, n, base + start, targets, coefficients + i, apart,
                    out + start, stride);
    }
  }
  return 1;
}

/* A module without members, for who imports all there is; where Python's headers are installed. */
#if defined(__has_include)
#if __has_include(<Python.h>)
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, NULL,
                                        NULL,                  NULL,      NULL, NULL};
PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
#endif
#endif
