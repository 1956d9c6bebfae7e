// What MindSpore hands to an ahead-of-time custom operator, checked: it validates neither shapes nor dtypes itself.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "simd.h"

// The signature that ops.Custom(func_type="aot") calls. 0 is success; MindSpore raises a RuntimeError with any other value.
#define TELECHAT_KERNEL(name)                                                                                    \
  extern "C" int name(int count, void** data, int* ranks, int64_t** shapes, const char** dtypes, void*, void*)

namespace telechat {

enum class Dtype { kFloat, kHalf, kBrain, kInt, kBool, kOther };

struct Fault {
  std::string text;
};

struct Argument {
  void* data;
  int rank;
  const int64_t* shape;
  Dtype dtype;

  size_t size(int axis) const { return size_t(shape[axis]); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// The inputs of a call and, last, its output.
class Arguments {
 public:
  Arguments(int count, void** data, int* ranks, int64_t** shapes, const char** dtypes)
      : count_(count), data_(data), ranks_(ranks), shapes_(shapes), dtypes_(dtypes) {}

  int count() const { return count_; }

  void expect_count(int least, int most) const {
    if (count_ < least || count_ > most) throw Fault{"has " + std::to_string(count_) + " arguments"};
  }

  Argument get(int index, int rank, const char* name) const {
    if (index >= count_) throw Fault{std::string(name) + " is missing"};
    if (ranks_[index] != rank) {
      throw Fault{std::string(name) + " has rank " + std::to_string(ranks_[index]) + ", expected " +
                  std::to_string(rank)};
    }
    return Argument{data_[index], rank, shapes_[index], dtype(dtypes_[index])};
  }

  Argument get(int index, int rank, Dtype expected, const char* name) const {
    const Argument found = get(index, rank, name);
    if (found.dtype != expected) throw Fault{std::string(name) + " has dtype " + dtypes_[index]};
    return found;
  }

  Argument floats(int index, int rank, const char* name) const { return get(index, rank, Dtype::kFloat, name); }

 private:
  static Dtype dtype(const char* name) {
    if (!std::strcmp(name, "float32")) return Dtype::kFloat;
    if (!std::strcmp(name, "float16")) return Dtype::kHalf;
    if (!std::strcmp(name, "bfloat16")) return Dtype::kBrain;
    if (!std::strcmp(name, "int32")) return Dtype::kInt;
    if (!std::strcmp(name, "bool")) return Dtype::kBool;
    return Dtype::kOther;
  }

  int count_;
  void** data_;
  int* ranks_;
  int64_t** shapes_;
  const char** dtypes_;
};

inline void expect(bool fits, const char* what) {
  if (!fits) throw Fault{what};
}

// Calls body(pointer) with a pointer of the argument's own type.
template <class Body>
void with_stored(const Argument& argument, const char* name, Body&& body) {
  switch (argument.dtype) {
    case Dtype::kFloat: return body(argument.as<const float>());
    case Dtype::kHalf: return body(argument.as<const Half>());
    case Dtype::kBrain: return body(argument.as<const Brain>());
    default: throw Fault{std::string(name) + " is neither float32, float16 nor bfloat16"};
  }
}

// Runs a kernel's body; a fault becomes one line on stderr, since MindSpore shows only the number that is returned.
template <class Body>
int guarded(const char* kernel, Body&& body) {
  try {
    body();
    return 0;
  } catch (const Fault& fault) {
    std::fprintf(stderr, "telechat kernel %s: %s\n", kernel, fault.text.c_str());
    return 1;
  } catch (const std::exception& error) {  // out of memory, or of threads
    std::fprintf(stderr, "telechat kernel %s: %s\n", kernel, error.what());
    return 2;
  }
}

// Memory of the calling thread, aligned to a cache line, that grows and is kept for the next call. `Use` tells apart the
// buffers that are alive at the same time.
template <int Use>
float* scratch(size_t count) {
  struct Buffer {
    float* data = nullptr;
    size_t capacity = 0;
    ~Buffer() { ::operator delete[](data, std::align_val_t(64)); }
  };
  static thread_local Buffer buffer;
  if (buffer.capacity < count) {
    float* grown = static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t(64)));
    ::operator delete[](buffer.data, std::align_val_t(64));
    buffer.data = grown;
    buffer.capacity = count;
  }
  return buffer.data;
}

// Names for scratch: what a kernel's caller prepares, what each thread needs for its chunk, and what lies between the
// layers of a decoder.
enum Buffers {
  kActivations,
  kRotated,
  kHidden,
  kChunk,
  kChunkSecond,
  kColumns,
  kTile,
  kResidual,
  kSecondResidual,
  kPacked,
  kAttended,
  kGated,
  kNormed,
  kScores
};

}  // namespace telechat
