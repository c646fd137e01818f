/* The inner loops over numbers, compiled: see native.py, which calls them through ctypes.

   Plain C: pointers and counts come in, numbers go out, nothing is allocated and nothing is kept,
   so that any number of threads may call. Where a function here has a twin in
   numpy (blocks.py, encoding.py, kernels.py), files written by either are the same byte for byte
   (but for the digits of measured rounding errors). */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

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
  BEST(combine)(type, files, stored, count, base, targets, coefficients, out, stride);
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

/* average[track] += weight[track] (source - average[track]) for a list of tensors.

   sources, counts: of each tensor, its numbers of `type`, and how many. averages, strides: where
   its averages of the first track begin, and how far apart those of the tracks are. */
EXPORT void lerp(int type, int64_t tensors, const uint8_t *const *sources, const int64_t *counts,
                 float *const *averages, const int64_t *strides, int64_t tracks,
                 const float *weights) {
  BEST(lerp)(type, tensors, sources, counts, averages, strides, tracks, weights);
}

/* Whether all numbers of a list of tensors are finite. */
EXPORT int all_finite(int type, int64_t tensors, const uint8_t *const *sources,
                      const int64_t *counts) {
  return BEST(all_finite)(type, tensors, sources, counts);
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
