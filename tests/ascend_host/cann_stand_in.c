/* The few functions of CANN that the kernels' host code asks for something; the build gives all others as "return 0". */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CUBE_CORES = 24, VECTOR_CORES = 48 }; /* of a 910B2 */

const char *aclrtGetSocName(void) { return "Ascend910B2"; }
int rtGetSocVersion(char *version, uint32_t size) {
  snprintf(version, size, "%s", aclrtGetSocName());
  return 0;
}
int aclrtGetDeviceCount(uint32_t *count) {
  *count = 8;
  return 0;
}
int aclrtGetDevice(int *device) {
  *device = 0;
  return 0;
}
int aclrtGetResInCurrentThread(int type, uint32_t *cores) {
  *cores = type == 0 ? CUBE_CORES : VECTOR_CORES;
  return 0;
}

int aclrtMalloc(void **memory, size_t size, int policy) {
  (void)policy;
  *memory = calloc(1, size + 64);
  return 0;
}
int aclrtMallocHost(void **memory, size_t size) { return aclrtMalloc(memory, size, 0); }
int aclrtFree(void *memory) {
  free(memory);
  return 0;
}
int aclrtFreeHost(void *memory) { return aclrtFree(memory); }

/* The platform's sizes: of the classes fe::PlatformInfoManager and fe::PlatFormInfos, by their mangled names. */
static char platform[65536];
void *platform_instance(void) __asm__("_ZN2fe19PlatformInfoManager10GeInstanceEv");
void *platform_instance(void) { return platform; }
uint32_t core_count(void *self) __asm__("_ZNK2fe13PlatFormInfos10GetCoreNumEv");
uint32_t core_count(void *self) {
  (void)self;
  return CUBE_CORES;
}
void memory_size(void *self, const int *kind, uint64_t *bytes)
    __asm__("_ZN2fe13PlatFormInfos15GetLocalMemSizeERKNS_12LocalMemTypeERm");
void memory_size(void *self, const int *kind, uint64_t *bytes) {
  /* L0A, L0B, L0C, L1, L2, UB, HBM */
  static const uint64_t sizes[] = {65536, 65536, 131072, 524288, 201326592, 196608, 34359738368};
  (void)self;
  *bytes = sizes[*kind];
}

/* Of the safe C library. */
int memcpy_s(void *to, size_t size, const void *from, size_t count) {
  if (count > size) return 1;
  memcpy(to, from, count);
  return 0;
}
int memset_s(void *to, size_t size, int value, size_t count) {
  if (count > size) return 1;
  memset(to, value, count);
  return 0;
}
int strcpy_s(char *to, size_t size, const char *from) {
  snprintf(to, size, "%s", from);
  return 0;
}
int vsnprintf_s(char *to, size_t size, size_t count, const char *format, va_list arguments) {
  (void)count;
  return vsnprintf(to, size, format, arguments);
}
int snprintf_s(char *to, size_t size, size_t count, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int written = vsnprintf_s(to, size, count, format, arguments);
  va_end(arguments);
  return written;
}
