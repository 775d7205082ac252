/* A CUDA driver without a device, for Triton and inductor: libcuda.so.1. Modules load, kernels do nothing.

   build.py adds the functions of cuda.h that are missing here: they succeed and do nothing. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "device.h"

typedef int Result; /* CUresult; cuda.h is not included, for its macros would rename these functions */
enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_SUPPORTED = 801 };

static int placeholder; /* every handle points here */

Result cuInit(unsigned flags) { return SUCCESS; }
Result cuDriverGetVersion(int* version) {
  *version = CUDA_STUB_VERSION;
  return SUCCESS;
}
Result cuDeviceGetCount(int* count) {
  *count = 1;
  return SUCCESS;
}
Result cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return SUCCESS;
}
Result cuDeviceGetName(char* name, int size, int device) {
  snprintf(name, size, DEVICE_NAME);
  return SUCCESS;
}
Result cuDeviceTotalMem_v2(size_t* size, int device) {
  *size = DEVICE_BYTES;
  return SUCCESS;
}
Result cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  *free_bytes = *total = DEVICE_BYTES;
  return SUCCESS;
}
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = device_attribute(attribute);
  return SUCCESS;
}
Result cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  *active = 1;
  return SUCCESS;
}
Result cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &placeholder;
  return SUCCESS;
}
Result cuCtxGetCurrent(void** context) {
  *context = &placeholder;
  return SUCCESS;
}
Result cuCtxGetDevice(int* device) {
  *device = 0;
  return SUCCESS;
}
Result cuCtxGetApiVersion(void* context, unsigned* version) {
  *version = CUDA_STUB_VERSION;
  return SUCCESS;
}
Result cuGetErrorString(Result error, const char** text) {
  *text = "an error of the stand-in";
  return SUCCESS;
}
Result cuGetErrorName(Result error, const char** text) {
  *text = "CUDA_ERROR_OF_STUB";
  return SUCCESS;
}
Result cuModuleLoadData(void** module, const void* image) {
  *module = &placeholder;
  return SUCCESS;
}
Result cuModuleLoadDataEx(void** module, const void* image, unsigned count, void* options, void* values) {
  return cuModuleLoadData(module, image);
}
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = &placeholder;
  return SUCCESS;
}
Result cuLibraryLoadData(void** library, const void* code, void* options, void* values, unsigned count,
                         void* library_options, void* library_values, unsigned library_count) {
  *library = &placeholder;
  return SUCCESS;
}
Result cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  *kernel = &placeholder;
  return SUCCESS;
}
Result cuKernelGetFunction(void** function, void* kernel) {
  *function = &placeholder;
  return SUCCESS;
}
Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  enum { MOST_THREADS = 0, REGISTERS = 4 };
  *value = attribute == MOST_THREADS ? 1024 : attribute == REGISTERS ? 32 : 0;
  return SUCCESS;
}
Result cuPointerGetAttribute(void* value, int attribute, unsigned long long pointer) {
  *(unsigned long long*)value = pointer;
  return SUCCESS;
}
Result cuStreamIsCapturing(void* stream, int* status) {
  *status = 0;
  return SUCCESS;
}
Result cuGetExportTable(const void** table, const void* id) {
  *table = NULL;
  return NOT_SUPPORTED;
}

static long launches;
long stub_driver_launches(void) { return launches; }

Result cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y,
                      unsigned z, unsigned shared, void* stream, void** arguments, void** extra) {
  launches++;
  if (launch_is_valid(grid_x, grid_y, grid_z, x, y, z)) return SUCCESS;
  fprintf(stderr, "invalid launch: grid %u %u %u, block %u %u %u\n", grid_x, grid_y, grid_z, x, y, z);
  return INVALID_VALUE;
}
typedef struct {
  unsigned grid_x, grid_y, grid_z, x, y, z, shared;
  void* stream;
} LaunchConfig; /* how CUlaunchConfig begins */
Result cuLaunchKernelEx(const LaunchConfig* config, void* function, void** arguments, void** extra) {
  return cuLaunchKernel(function, config->grid_x, config->grid_y, config->grid_z, config->x, config->y, config->z,
                        config->shared, config->stream, arguments, extra);
}

static Result succeed(void) { return SUCCESS; }
Result cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* status) {
  char newer[200];
  snprintf(newer, sizeof newer, "%s_v2", name);
  void* self = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_NOW);
  *function = self ? dlsym(self, newer) : NULL;
  if (!*function && self) *function = dlsym(self, name);
  if (!*function) *function = (void*)succeed;
  if (status) *status = 0;
  return SUCCESS;
}
Result cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
