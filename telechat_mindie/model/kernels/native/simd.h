// Vectors of float and the three dtypes that weights are stored in, for AVX-512, AVX2 with FMA and F16C, and any CPU.
//
// The path is chosen by the compiler's flags. bfloat16 is read two vectors at a time as even and odd elements, because
// a shift and a mask widen it in place; what it is multiplied with is laid out the same way (Split<T>::value).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace telechat {

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

template <class T>
struct Split {
  static constexpr bool value = false;
};
template <>
struct Split<Brain> {
  static constexpr bool value = true;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }

inline float widen(Brain value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline float widen(Half value) {
#if defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &value.bits, sizeof half);
  return half;
#elif defined(__F16C__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(value.bits)));
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));  // infinity, NaN
  // The exponent's bias is 15 here and 127 there; multiplying by 2^112 mends it, for subnormal numbers too.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
#endif
}

inline void narrow(float value, float* to) { *to = value; }

inline void narrow(float value, Brain* to) {  // to nearest, ties to even
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    to->bits = uint16_t(bits >> 16 | 0x40u);
  } else {
    to->bits = uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}

inline void narrow(float value, Half* to) {  // to nearest, ties to even
#if defined(__aarch64__)
  const __fp16 half = __fp16(value);
  std::memcpy(&to->bits, &half, sizeof half);
#elif defined(__F16C__)
  to->bits = uint16_t(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT)));
#else
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) {
    to->bits = sign | 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520 and above round to infinity
    to->bits = sign | 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: the sum with 0.5 rounds at the right bit
    to->bits = sign | uint16_t(float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u);
  } else {
    to->bits = sign | uint16_t((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
  }
#endif
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
using Lanes = __m512;

inline Lanes zero() { return _mm512_setzero_ps(); }
inline Lanes splat(float value) { return _mm512_set1_ps(value); }
inline Lanes load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Lanes value) { _mm512_storeu_ps(to, value); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes divide(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
inline Lanes maximum(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes minimum(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
inline float sum(Lanes a) { return _mm512_reduce_add_ps(a); }
inline float largest(Lanes a) { return _mm512_reduce_max_ps(a); }
inline Lanes round_nearest(Lanes a) { return _mm512_roundscale_ps(a, 0); }
inline Lanes times_power_of_two(Lanes a, Lanes exponent) { return _mm512_scalef_ps(a, exponent); }

inline Lanes load(const Half* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
inline Lanes load(const Brain* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void load_pair(const Brain* from, Lanes* even, Lanes* odd) {
  const __m512i both = _mm512_loadu_si512(from);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
}

inline void splat_two(const Brain* from, Lanes* first, Lanes* second) {
  int bits;
  std::memcpy(&bits, from, sizeof bits);
  const __m512i both = _mm512_set1_epi32(bits);
  *first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  *second = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
}

// The sums of four vectors.
inline void sum_four(Lanes a, Lanes b, Lanes c, Lanes d, float* to) {
  const Lanes ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Lanes cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const Lanes quads = add(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(quads), 1));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quads), upper);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

// to[c * to_stride + r] = from[r * from_stride + c] for kLanes rows and columns: pairs, quadruples, then quarters of them.
inline void transpose_square(const float* from, size_t from_stride, float* to, size_t to_stride) {
  Lanes rows[16], pairs[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) rows[r] = load(from + r * from_stride);
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    pairs[r] = _mm512_unpacklo_ps(rows[r], rows[r + 1]);
    pairs[r + 1] = _mm512_unpackhi_ps(rows[r], rows[r + 1]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {  // column r % 4 of every quarter, of the four rows around r
    const __m512d above = _mm512_castps_pd(pairs[r / 4 * 4 + r % 4 / 2]);
    const __m512d below = _mm512_castps_pd(pairs[r / 4 * 4 + r % 4 / 2 + 2]);
    rows[r] = _mm512_castpd_ps(r % 2 ? _mm512_unpackhi_pd(above, below) : _mm512_unpacklo_pd(above, below));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Lanes even_above = _mm512_shuffle_f32x4(rows[c], rows[c + 4], 0x88);
    const Lanes even_below = _mm512_shuffle_f32x4(rows[c + 8], rows[c + 12], 0x88);
    const Lanes odd_above = _mm512_shuffle_f32x4(rows[c], rows[c + 4], 0xdd);
    const Lanes odd_below = _mm512_shuffle_f32x4(rows[c + 8], rows[c + 12], 0xdd);
    store(to + c * to_stride, _mm512_shuffle_f32x4(even_above, even_below, 0x88));
    store(to + (c + 4) * to_stride, _mm512_shuffle_f32x4(odd_above, odd_below, 0x88));
    store(to + (c + 8) * to_stride, _mm512_shuffle_f32x4(even_above, even_below, 0xdd));
    store(to + (c + 12) * to_stride, _mm512_shuffle_f32x4(odd_above, odd_below, 0xdd));
  }
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
using Lanes = __m256;

inline Lanes zero() { return _mm256_setzero_ps(); }
inline Lanes splat(float value) { return _mm256_set1_ps(value); }
inline Lanes load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Lanes value) { _mm256_storeu_ps(to, value); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline Lanes add(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
inline Lanes mul(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
inline Lanes divide(Lanes a, Lanes b) { return _mm256_div_ps(a, b); }
inline Lanes maximum(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
inline Lanes minimum(Lanes a, Lanes b) { return _mm256_min_ps(a, b); }
inline Lanes round_nearest(Lanes a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Lanes times_power_of_two(Lanes a, Lanes exponent) {  // of a in [0.5, 2] and -126 <= exponent <= 126
  const __m256i shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(exponent), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), shifted));
}
inline float sum(Lanes a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(Lanes a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline Lanes load(const Half* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
inline Lanes load(const Brain* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline void load_pair(const Brain* from, Lanes* even, Lanes* odd) {
  const __m256i both = _mm256_loadu_si256((const __m256i*)from);
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000u))));
}

inline void sum_four(Lanes a, Lanes b, Lanes c, Lanes d, float* to) {
  const Lanes quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}

#else

// Four lanes as a compiler's vector: one register of NEON or SSE.
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
typedef float Lanes __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

inline Lanes zero() { return Lanes{0, 0, 0, 0}; }
inline Lanes splat(float value) { return Lanes{value, value, value, value}; }
inline Lanes load(const float* from) {
  Lanes value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store(float* to, Lanes value) { std::memcpy(to, &value, sizeof value); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return a * b + c; }
inline Lanes add(Lanes a, Lanes b) { return a + b; }
inline Lanes mul(Lanes a, Lanes b) { return a * b; }
inline Lanes divide(Lanes a, Lanes b) { return a / b; }
inline Lanes maximum(Lanes a, Lanes b) { return a > b ? a : b; }
inline float sum(Lanes a) { return (a[0] + a[1]) + (a[2] + a[3]); }
inline float largest(Lanes a) { return std::fmax(std::fmax(a[0], a[1]), std::fmax(a[2], a[3])); }

typedef uint16_t Halves __attribute__((vector_size(8)));

inline Words load_bits(const uint16_t* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  return __builtin_convertvector(bits, Words);
}
inline Lanes load(const Half* from) {  // as widen(Half)
  const Words bits = load_bits(&from->bits), rest = bits & 0x7fffu;
  const Words magnitude = (Words)((Lanes)(rest << 13) * 0x1p112f);
  return (Lanes)((bits & 0x8000u) << 16 | magnitude | ((Words)(rest >= 0x7c00u) & 0x7f800000u));
}
inline Lanes load(const Brain* from) { return (Lanes)(load_bits(&from->bits) << 16); }
inline void load_pair(const Brain* from, Lanes* even, Lanes* odd) {  // little endian
  Words both;
  std::memcpy(&both, from, sizeof both);
  const Words low = both << 16, high = both & 0xffff0000u;
  std::memcpy(even, &low, sizeof low);
  std::memcpy(odd, &high, sizeof high);
}

inline void sum_four(Lanes a, Lanes b, Lanes c, Lanes d, float* to) {
  to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
}

#endif

// Two vectors of elements that follow each other in memory; of bfloat16 the even and the odd ones.
template <class T>
inline void load_pair(const T* from, Lanes* first, Lanes* second) {
  *first = load(from);
  *second = load(from + kLanes);
}

#if !defined(__AVX512F__)
// to[c * to_stride + r] = from[r * from_stride + c] for kLanes rows and columns.
inline void transpose_square(const float* from, size_t from_stride, float* to, size_t to_stride) {
  for (int c = 0; c < kLanes; ++c) {
    for (int r = 0; r < kLanes; ++r) to[c * to_stride + r] = from[r * from_stride + c];
  }
}
#endif

// Each of two elements that follow each other in memory, in all lanes of a vector.
template <class T>
inline void splat_two(const T* from, Lanes* first, Lanes* second) {
  *first = splat(widen(from[0]));
  *second = splat(widen(from[1]));
}

#if defined(__AVX512F__) || defined(__AVX2__)
// e^a to about 2 units in the last place, for a limited to [-87, 88]: 2^n times a polynomial in the rest, which is at most
// ln(2) / 2. The limits stand first because the instructions return their second operand when one is NaN.
inline Lanes exponential(Lanes a) {
  a = minimum(splat(88.0f), maximum(splat(-87.0f), a));
  const Lanes n = round_nearest(mul(a, splat(1.44269504088896341f)));
  Lanes rest = fma(n, splat(-0.693359375f), a);  // ln(2) in two parts, the first exact
  rest = fma(n, splat(2.12194440e-4f), rest);
  Lanes value = splat(1.0f / 5040);
  value = fma(value, rest, splat(1.0f / 720));
  value = fma(value, rest, splat(1.0f / 120));
  value = fma(value, rest, splat(1.0f / 24));
  value = fma(value, rest, splat(1.0f / 6));
  value = fma(value, rest, splat(0.5f));
  value = fma(value, rest, splat(1.0f));
  value = fma(value, rest, splat(1.0f));
  return times_power_of_two(value, n);
}
#else
inline Lanes exponential(Lanes a) { return Lanes{std::exp(a[0]), std::exp(a[1]), std::exp(a[2]), std::exp(a[3])}; }
#endif

constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace telechat
