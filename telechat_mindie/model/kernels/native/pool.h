// A small thread pool. Not OpenMP: MindSpore calls the kernels of one graph from different threads, and libgomp keeps a
// team for each of them.
#pragma once

#include <cstddef>

namespace telechat {

using Chunk = void (*)(void* context, size_t index);

// Runs chunk(context, i) for each i < count, on the calling thread and the pool's, and returns when all are done.
// Calls from several threads at once are safe: one has the pool, the others do their chunks alone.
void parallel(size_t count, Chunk chunk, void* context);

// Threads that take part, the caller among them.
size_t thread_count();

template <class Body>
void parallel_for(size_t count, Body&& body) {
  parallel(count, [](void* context, size_t index) { (*static_cast<Body*>(context))(index); }, &body);
}

}  // namespace telechat
