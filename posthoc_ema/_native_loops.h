/* Included by _native.c once for each set of instructions; WITH(name) names this one's. */

static void WITH(decode_halves)(const uint8_t *stored, int64_t count, float *out) {
  int64_t i = 0;
#if defined(HAS_F16C)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(stored + 2 * i))));
#elif defined(__aarch64__) && defined(__FLT16_MAX__)
  for (; i < count; i++) {
    _Float16 half;
    memcpy(&half, stored + 2 * i, 2);
    out[i] = (float)half;
  }
#endif
  for (; i < count; i++) {
    uint32_t half = (uint32_t)stored[2 * i] | (uint32_t)stored[2 * i + 1] << 8;
    /* Exponent and mantissa into place; the product corrects the bias of the exponent and
       normalises subnormals. Infinity and NaN get the exponent that is theirs. */
    float magnitude = float_of((half & 0x7FFF) << 13) * 0x1p112f;
    uint32_t special = (half & 0x7C00) == 0x7C00 ? 0x7F800000 : 0;
    out[i] = float_of(bits_of(magnitude) | special | (half & 0x8000) << 16);
  }
}

static void WITH(decode_bfloats)(const uint8_t *stored, int64_t count, float *out) {
  for (int64_t i = 0; i < count; i++) {
    uint16_t high;
    memcpy(&high, stored + 2 * i, 2);
    out[i] = float_of((uint32_t)high << 16);
  }
}

/* One block: planes from the highest bits down, each packed; two's complement in all. */
static void WITH(decode_block)(int bits, const uint8_t *stored, float *out) {
  float scale = load_bfloat16(stored);
  const uint8_t *plane = stored + 2;
  int32_t codes[BLOCK];
  int left = bits, first = 1;
  if (left >= 8) {
    for (int i = 0; i < BLOCK; i++) codes[i] = (int8_t)plane[i];
    plane += BLOCK, left -= 8, first = 0;
    if (left >= 8) {
      for (int i = 0; i < BLOCK; i++) codes[i] = codes[i] * 256 + plane[i];
      plane += BLOCK, left -= 8;
    }
  }
  if (left >= 4) {
    for (int i = 0; i < 32; i++) {
      int low = plane[i] & 15, high = plane[i] >> 4;
      codes[i] = first ? (low ^ 8) - 8 : codes[i] * 16 + low;
      codes[i + 32] = first ? (high ^ 8) - 8 : codes[i + 32] * 16 + high;
    }
    plane += 32, left -= 4;
  }
  if (left >= 2)
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < 16; i++)
        codes[16 * j + i] = codes[16 * j + i] * 4 + (plane[i] >> 2 * j & 3);
  for (int i = 0; i < BLOCK; i++) out[i] = (float)codes[i] * scale;
}

static void WITH(decode)(int type, const uint8_t *stored, int64_t count, float *out) {
  if (type == F32) {
    memcpy(out, stored, (size_t)count * 4);
  } else if (type == F16) {
    WITH(decode_halves)(stored, count, out);
  } else if (type == BF16) {
    WITH(decode_bfloats)(stored, count, out);
  } else {
    int bits = type - QUANTISED;
    for (; count > 0; count -= BLOCK, out += BLOCK, stored += block_bytes(bits)) {
      if (count >= BLOCK) {
        WITH(decode_block)(bits, stored, out);
      } else { /* filled up with zeros that nobody has room for */
        float last[BLOCK];
        WITH(decode_block)(bits, stored, last);
        memcpy(out, last, (size_t)count * 4);
      }
    }
  }
}

#if defined(HAS_F16C)
__attribute__((always_inline)) static inline __m256 load_eight(int type, const uint8_t *stored) {
  if (type == F32) return _mm256_loadu_ps((const float *)(const void *)stored);
  __m128i halves = _mm_loadu_si128((const __m128i *)(const void *)stored);
  if (type == F16) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* As combine, of ROWS files and whole eights of numbers, which stay in registers for all targets.
   The coefficients of a target are `apart` from those of the one before. */
__attribute__((always_inline)) static inline void combine_eights(
    int type, const uint8_t *const *stored, int64_t count, const float *base, int64_t targets,
    const float *coefficients, int64_t apart, double *out, int64_t stride) {
  for (int64_t e = 0; e < count; e += 8) {
    __m256 row[ROWS], from = base ? _mm256_loadu_ps(base + e) : _mm256_setzero_ps();
    for (int j = 0; j < ROWS; j++)
      row[j] = _mm256_sub_ps(load_eight(type, stored[j] + byte_of(type, e)), from);
    for (int64_t k = 0; k < targets; k++) {
      const float *x = coefficients + k * apart;
      double *total = out + k * stride + e;
      __m256 even = _mm256_mul_ps(_mm256_broadcast_ss(x), row[0]);
      __m256 odd = _mm256_mul_ps(_mm256_broadcast_ss(x + 1), row[1]);
      for (int j = 2; j < ROWS; j += 2) {
        even = _mm256_fmadd_ps(_mm256_broadcast_ss(x + j), row[j], even);
        odd = _mm256_fmadd_ps(_mm256_broadcast_ss(x + j + 1), row[j + 1], odd);
      }
      even = _mm256_add_ps(even, odd);
      __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(even));
      __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(even, 1));
      _mm256_storeu_pd(total, _mm256_add_pd(_mm256_loadu_pd(total), low));
      _mm256_storeu_pd(total + 4, _mm256_add_pd(_mm256_loadu_pd(total + 4), high));
    }
  }
}

static void combine_whole_eights(int type, int64_t files, const uint8_t *const *stored,
                                 int64_t count, const float *base, int64_t targets,
                                 const float *coefficients, int64_t apart, double *out,
                                 int64_t stride) {
  for (int64_t i = 0; i < files; i += ROWS) {
    const float *x = coefficients + i;
    if (type == F32)
      combine_eights(F32, stored + i, count, base, targets, x, apart, out, stride);
    else if (type == F16)
      combine_eights(F16, stored + i, count, base, targets, x, apart, out, stride);
    else
      combine_eights(BF16, stored + i, count, base, targets, x, apart, out, stride);
  }
}

/* The last few numbers are filled up to eight, target by target: a number is summed in one order,
   whichever others stand beside it. */
static void combine_floats(int type, int64_t files, const uint8_t *const *stored, int64_t count,
                           const float *base, int64_t targets, const float *coefficients,
                           int64_t apart, double *out, int64_t stride) {
  int64_t whole = count & ~(int64_t)7, rest = count - whole;
  combine_whole_eights(type, files, stored, whole, base, targets, coefficients, apart, out, stride);
  if (!rest) return;
  size_t size = (size_t)byte_of(type, rest);
  for (int64_t i = 0; i < files; i += ROWS) {
    uint8_t bytes[ROWS][32] = {{0}};
    const uint8_t *rows[ROWS];
    float from[8] = {0};
    for (int j = 0; j < ROWS; j++) {
      memcpy(bytes[j], stored[i + j] + byte_of(type, whole), size);
      rows[j] = bytes[j];
    }
    if (base) memcpy(from, base + whole, (size_t)rest * sizeof(float));
    for (int64_t k = 0; k < targets; k++) {
      double total[8] = {0}, *last = out + k * stride + whole;
      memcpy(total, last, (size_t)rest * sizeof(double));
      combine_whole_eights(type, ROWS, rows, 8, base ? from : NULL, 1,
                           coefficients + k * apart + i, apart, total, 8);
      memcpy(last, total, (size_t)rest * sizeof(double));
    }
  }
}
#endif

static void WITH(combine)(int type, int64_t files, const uint8_t *const *stored, int64_t count,
                          const float *base, int64_t targets, const float *coefficients,
                          int64_t apart, double *out, int64_t stride) {
#if defined(HAS_F16C)
  if (type < QUANTISED) {
    combine_floats(type, files, stored, count, base, targets, coefficients, apart, out, stride);
    return;
  }
#endif
  float rows[ROWS][TILE];
  for (int64_t start = 0; start < count; start += TILE) {
    int64_t n = count - start < TILE ? count - start : TILE, skip = byte_of(type, start);
    for (int64_t i = 0; i < files; i += ROWS) {
      for (int64_t j = 0; j < ROWS; j++) {
        float *row = rows[j];
        if (j && stored[i + j] == stored[i]) { /* absent */
          memset(row, 0, (size_t)n * 4);
          continue;
        }
        WITH(decode)(type, stored[i + j] + skip, n, row);
        if (base)
          for (int64_t e = 0; e < n; e++) row[e] -= base[start + e];
      }
      for (int64_t k = 0; k < targets; k++) {
        double *total = out + k * stride + start;
        const float *x = coefficients + k * apart + i;
        for (int64_t e = 0; e < n; e++)
          total[e] += ((x[0] * rows[0][e] + x[2] * rows[2][e]) +
                       (x[4] * rows[4][e] + x[6] * rows[6][e])) +
                      ((x[1] * rows[1][e] + x[3] * rows[3][e]) +
                       (x[5] * rows[5][e] + x[7] * rows[7][e]));
      }
    }
  }
}

static int WITH(finish)(const double *total, const float *base, int64_t count, float *out) {
  uint32_t found = 0;
  for (int64_t e = 0; e < count; e++) {
    out[e] = (float)(total[e] + base[e]);
    uint32_t bits;
    memcpy(&bits, out + e, 4);
    found |= (bits & 0x7FFFFFFF) + 0x00800000; /* an exponent of ones alone overflows */
  }
  return !(found & 0x80000000);
}

/* One block of finite numbers; returns the sum of squared rounding errors. */
static double WITH(encode_block)(int bits, const float *values, uint8_t *stored, float *decoded) {
  float top = (float)((1 << (bits - 1)) - 1), largest = 0, most[LANES] = {0};
  double sums[LANES] = {0};
  for (int i = 0; i < BLOCK; i += LANES)
    for (int j = 0; j < LANES; j++) {
      float magnitude = fabsf(values[i + j]);
      most[j] = magnitude > most[j] ? magnitude : most[j];
    }
  for (int j = 0; j < LANES; j++) largest = most[j] > largest ? most[j] : largest;
  /* Below, the reciprocal of the scale would overflow. */
  uint16_t high = largest > 0x1p-110f ? bfloat16_above(largest / top) : 0;
  float scale = float_of((uint32_t)high << 16), inverse = scale > 0 ? 1 / scale : 0;
  int32_t codes[BLOCK];
  for (int i = 0; i < BLOCK; i += LANES)
    for (int j = 0; j < LANES; j++) {
      float scaled = values[i + j] * inverse, code = nearbyintf(scaled);
      codes[i + j] = (int32_t)code;
      decoded[i + j] = code * scale + 0.0f; /* integers have no negative zero */
      /* By way of the scaled number: decoded - value would round once more. */
      float error = scale > 0 ? (scaled - code) * scale : values[i + j];
      sums[j] += (double)error * error;
    }
  stored[0] = (uint8_t)high, stored[1] = (uint8_t)(high >> 8);
  uint8_t *plane = stored + 2;
  int left = bits;
  while (left >= 8) {
    left -= 8;
    for (int i = 0; i < BLOCK; i++) plane[i] = (uint8_t)(codes[i] >> left);
    plane += BLOCK;
  }
  if (left >= 4) {
    left -= 4;
    for (int i = 0; i < 32; i++)
      plane[i] = (uint8_t)((codes[i] >> left & 15) | (codes[i + 32] >> left & 15) << 4);
    plane += 32;
  }
  if (left >= 2)
    for (int i = 0; i < 16; i++)
      plane[i] = (uint8_t)((codes[i] & 3) | (codes[i + 16] & 3) << 2 | (codes[i + 32] & 3) << 4 |
                           (codes[i + 48] & 3) << 6);
  double square = 0;
  for (int j = 0; j < LANES; j++) square += sums[j];
  return square;
}

/* To nearest even, of finite numbers that fit. */
static void WITH(encode_halves)(const float *values, int64_t count, uint8_t *stored) {
  int64_t i = 0;
#if defined(HAS_F16C)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128((__m128i *)(stored + 2 * i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__) && defined(__FLT16_MAX__)
  for (; i < count; i++) {
    _Float16 half = (_Float16)values[i];
    memcpy(stored + 2 * i, &half, 2);
  }
#endif
  for (; i < count; i++) {
    uint32_t bits = bits_of(values[i]), magnitude = bits & 0x7FFFFFFF, half;
    if (magnitude < 0x38800000) /* subnormal: the addition rounds to its spacing */
      half = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;
    else
      half = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    half |= bits >> 16 & 0x8000;
    stored[2 * i] = (uint8_t)half, stored[2 * i + 1] = (uint8_t)(half >> 8);
  }
}

static void WITH(encode_bfloats)(const float *values, int64_t count, uint8_t *stored) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits = bits_of(values[i]);
    uint16_t high = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    memcpy(stored + 2 * i, &high, 2);
  }
}

static double WITH(encode)(int type, const float *values, int64_t number,
                           const double *const *rows, const double *factors, int64_t count,
                           uint8_t *stored, double *decoded) {
  double square = 0, predicted[TILE];
  float rest[TILE], found[TILE];
  for (int64_t start = 0; start < count; start += TILE) {
    int64_t n = count - start < TILE ? count - start : TILE, filled = n;
    uint8_t *bytes = stored + byte_of(type, start);
    if (!number) memcpy(rest, values + start, (size_t)n * 4);
    if (number) memset(predicted, 0, sizeof predicted);
    for (int64_t i = 0; i < number; i++) {
      const double *row = rows[i] + start;
      double factor = factors[i];
      for (int64_t e = 0; e < n; e++) predicted[e] += factor * row[e];
    }
    for (int64_t e = 0; number && e < n; e++) rest[e] = (float)(values[start + e] - predicted[e]);
    if (type >= QUANTISED) {
      int bits = type - QUANTISED;
      while (filled % BLOCK) rest[filled++] = 0;
      for (int64_t e = 0; e < filled; e += BLOCK, bytes += block_bytes(bits))
        square += WITH(encode_block)(bits, rest + e, bytes, found + e);
    } else if (type == F32) {
      memcpy(bytes, rest, (size_t)n * 4);
      memcpy(found, rest, (size_t)n * 4);
    } else {
      if (type == F16)
        WITH(encode_halves)(rest, n, bytes);
      else
        WITH(encode_bfloats)(rest, n, bytes);
      WITH(decode)(type, bytes, n, found);
      while (filled % LANES) rest[filled] = found[filled] = 0, filled++;
      double sums[LANES] = {0};
      for (int64_t e = 0; e < filled; e += LANES)
        for (int j = 0; j < LANES; j++) {
          float error = found[e + j] - rest[e + j];
          sums[j] += (double)error * error;
        }
      for (int j = 0; j < LANES; j++) square += sums[j];
    }
    if (decoded)
      for (int64_t e = 0; e < n; e++) decoded[start + e] = number ? found[e] + predicted[e] : found[e];
  }
  return square;
}

static void WITH(measure)(const float *values, int64_t count, double *square, float *largest) {
  double sums[LANES] = {0};
  float most[LANES] = {0};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int j = 0; j < LANES; j++) {
      float value = values[i + j], magnitude = fabsf(value);
      sums[j] += (double)value * value;
      most[j] = magnitude > most[j] ? magnitude : most[j];
    }
  for (; i < count; i++) {
    sums[0] += (double)values[i] * values[i];
    most[0] = fabsf(values[i]) > most[0] ? fabsf(values[i]) : most[0];
  }
  *square = 0, *largest = 0;
  for (int j = 0; j < LANES; j++) {
    *square += sums[j];
    *largest = most[j] > *largest ? most[j] : *largest;
  }
}

/* One average, or two at once, which brings the source into the processor once. */
static void WITH(lerp_one)(const float *source, int64_t n, float weight, float *average) {
  float rest = 1 - weight;
  if (weight < 0.5f) {
    for (int64_t e = 0; e < n; e++) average[e] += weight * (source[e] - average[e]);
  } else { /* exact at one */
    for (int64_t e = 0; e < n; e++) average[e] = source[e] - rest * (source[e] - average[e]);
  }
}

static void WITH(lerp_two)(const float *restrict source, int64_t n, float a, float b,
                           float *restrict first, float *restrict second) {
  for (int64_t e = 0; e < n; e++) {
    float value = source[e];
    first[e] += a * (value - first[e]);
    second[e] += b * (value - second[e]);
  }
}

static void WITH(lerp)(int type, int64_t tensors, const uint8_t *const *sources,
                       const int64_t *counts, float *const *averages, const int64_t *strides,
                       int64_t tracks, const float *weights) {
  float converted[TILE];
  for (int64_t t = 0; t < tensors; t++) {
    int64_t step = type == F32 ? LERP_TILE : TILE;
    for (int64_t start = 0; start < counts[t]; start += step) {
      int64_t n = counts[t] - start < step ? counts[t] - start : step, k = 0;
      const float *source = (const float *)(const void *)(sources[t] + byte_of(type, start));
      float *average = averages[t] + start;
      if (type != F32) {
        WITH(decode)(type, sources[t] + byte_of(type, start), n, converted);
        source = converted;
      }
      while (k < tracks) {
        float *next = average + (k + 1) * strides[t];
        if (k + 1 < tracks && weights[k] < 0.5f && weights[k + 1] < 0.5f) {
          WITH(lerp_two)(source, n, weights[k], weights[k + 1], next - strides[t], next);
          k += 2;
        } else {
          WITH(lerp_one)(source, n, weights[k], next - strides[t]);
          k++;
        }
      }
    }
  }
}

static int WITH(all_finite)(int type, int64_t tensors, const uint8_t *const *sources,
                            const int64_t *counts) {
  uint32_t found = 0;
  for (int64_t t = 0; t < tensors; t++) {
    if (type == F32) {
      const uint8_t *source = sources[t];
      for (int64_t i = 0; i < counts[t]; i++) {
        uint32_t bits;
        memcpy(&bits, source + 4 * i, 4);
        /* An exponent of ones alone overflows into the sign. */
        found |= (bits & 0x7FFFFFFF) + 0x00800000;
      }
    } else {
      uint16_t one = type == F16 ? 0x0400 : 0x0080, overflowed = 0;
      const uint8_t *source = sources[t];
      for (int64_t i = 0; i < counts[t]; i++) {
        uint16_t bits;
        memcpy(&bits, source + 2 * i, 2);
        overflowed |= (uint16_t)((bits & 0x7FFF) + one);
      }
      found |= (uint32_t)overflowed << 16;
    }
    if (found & 0x80000000) return 0;
  }
  return 1;
}

/* Stripes of XXH3, under keys 8 bytes apart: lanes of 64 bits, each multiplied in halves under its
   key, and added to its neighbour. */
static void WITH(hash_stripes)(uint64_t *lanes, const uint8_t *data, const uint8_t *key,
                               int64_t stripes) {
#if defined(HAS_F16C)
  __m256i sums[2];
  memcpy(sums, lanes, sizeof sums);
  for (int64_t k = 0; k < stripes; k++)
    for (int i = 0; i < 2; i++) {
      const void *at = data + 64 * k + 32 * i, *under = key + 8 * k + 32 * i;
      __m256i values = _mm256_loadu_si256((const __m256i *)at);
      __m256i keyed = _mm256_xor_si256(values, _mm256_loadu_si256((const __m256i *)under));
      __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
      sums[i] = _mm256_add_epi64(sums[i], _mm256_shuffle_epi32(values, 0x4E));
      sums[i] = _mm256_add_epi64(sums[i], product);
    }
  memcpy(lanes, sums, sizeof sums);
#else
  for (int64_t k = 0; k < stripes; k++)
    for (int i = 0; i < 8; i++) {
      uint64_t value = load_word(data + 64 * k + 8 * i);
      uint64_t keyed = value ^ load_word(key + 8 * k + 8 * i);
      lanes[i ^ 1] += value;
      lanes[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
    }
#endif
}

/* Between as many stripes as there are keys. */
static void WITH(hash_scramble)(uint64_t *lanes, const uint8_t *key) {
#if defined(HAS_F16C) /* by halves: a compiler makes twenty shifts of the product */
  const __m256i prime = _mm256_set1_epi32((int)0x9E3779B1U);
  for (int i = 0; i < 8; i += 4) {
    __m256i *four = (__m256i *)(void *)(lanes + i), lane = _mm256_loadu_si256(four);
    lane = _mm256_xor_si256(lane, _mm256_srli_epi64(lane, 47));
    lane = _mm256_xor_si256(lane, _mm256_loadu_si256((const __m256i *)(const void *)(key + 8 * i)));
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(lane, 32), prime);
    lane = _mm256_add_epi64(_mm256_mul_epu32(lane, prime), _mm256_slli_epi64(high, 32));
    _mm256_storeu_si256(four, lane);
  }
#else
  for (int i = 0; i < 8; i++)
    lanes[i] = (lanes[i] ^ lanes[i] >> 47 ^ load_word(key + 8 * i)) * 0x9E3779B1U;
#endif
}

/* XXH3 of 64 bits, without a seed, of more than 240 bytes. */
static uint64_t WITH(hash)(const uint8_t *data, int64_t size) {
  uint64_t lanes[8];
  memcpy(lanes, HASH_START, sizeof lanes);
  int64_t whole = (size - 1) / 1024;
  for (int64_t n = 0; n < whole; n++) {
    WITH(hash_stripes)(lanes, data + 1024 * n, HASH_KEY, 16);
    WITH(hash_scramble)(lanes, HASH_KEY + 128);
  }
  WITH(hash_stripes)(lanes, data + 1024 * whole, HASH_KEY, (size - 1) % 1024 / 64);
  WITH(hash_stripes)(lanes, data + size - 64, HASH_KEY + 121, 1);
  return hash_end(lanes, size);
}
