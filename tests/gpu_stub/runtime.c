/* A CUDA runtime without a device, for torch: it is preloaded in front of libcudart and cuBLAS.

   Memory and copies are the host's, every stream is in order because everything is done at once, and kernels do
   nothing. A launch that a GPU would refuse is refused. build.py adds the functions that are missing here: they
   succeed and do nothing.

   The environment variable CUDA_STUB_MIB is the device's memory: an allocation beyond it fails as on a GPU. */

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "device.h"

/* --- memory: a list of what is allocated, so that torch can ask what a pointer points to --- */

enum { NOTHING, HOST, DEVICE };
typedef struct {
  char* begin;
  size_t size;
  int kind;
} Block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Block* blocks;
static size_t num_blocks, capacity, bytes[3], num_allocations[3];
static __thread cudaError_t last_error = cudaSuccess;

static size_t device_bytes(void) {
  const char* mib = getenv("CUDA_STUB_MIB");
  return mib ? (size_t)atol(mib) << 20 : DEVICE_BYTES;
}

static cudaError_t failed(cudaError_t error) { return last_error = error; }

static cudaError_t allocate(void** pointer, size_t size, int kind) {
  pthread_mutex_lock(&lock);
  size_t mapped = size ? size : 1;
  int fits = kind == HOST || bytes[DEVICE] + size <= device_bytes();
  if (fits) {
    *pointer = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    fits = *pointer != MAP_FAILED;
  }
  if (fits) {
    if (num_blocks == capacity) blocks = realloc(blocks, (capacity = 2 * capacity + 64) * sizeof *blocks);
    blocks[num_blocks++] = (Block){*pointer, mapped, kind};
    bytes[kind] += mapped;
    num_allocations[kind]++;
  }
  pthread_mutex_unlock(&lock);
  return fits ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

static Block* block_of(const void* pointer) {
  for (size_t i = 0; i < num_blocks; i++)
    if ((char*)pointer >= blocks[i].begin && (char*)pointer < blocks[i].begin + blocks[i].size) return blocks + i;
  return NULL;
}

static cudaError_t release(void* pointer) {
  if (!pointer) return cudaSuccess;
  pthread_mutex_lock(&lock);
  Block* block = block_of(pointer);
  if (block) {
    bytes[block->kind] -= block->size;
    munmap(block->begin, block->size);
    *block = blocks[--num_blocks];
  }
  pthread_mutex_unlock(&lock);
  return block ? cudaSuccess : failed(cudaErrorInvalidValue);
}

cudaError_t cudaMalloc(void** pointer, size_t size) { return allocate(pointer, size, DEVICE); }
cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t stream) { return cudaMalloc(pointer, size); }
cudaError_t cudaFree(void* pointer) { return release(pointer); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) { return release(pointer); }
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned flags) { return allocate(pointer, size, HOST); }
cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *total = device_bytes();
  *free_bytes = *total - bytes[DEVICE];
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  pthread_mutex_lock(&lock);
  Block* block = block_of(pointer);
  int kind = block ? block->kind : NOTHING;
  pthread_mutex_unlock(&lock);
  attributes->type = kind == HOST     ? cudaMemoryTypeHost
                     : kind == DEVICE ? cudaMemoryTypeDevice
                                      : cudaMemoryTypeUnregistered;
  attributes->devicePointer = attributes->hostPointer = (void*)pointer;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, enum cudaMemcpyKind kind) {
  memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy(to, from, size, kind);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int device, const void* from, int source, size_t size, cudaStream_t stream) {
  return cudaMemcpy(to, from, size, cudaMemcpyDefault);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++)
    memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* pointer, int value, size_t size) {
  memset(pointer, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t stream) {
  return cudaMemset(pointer, value, size);
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  static char memory[1 << 20];
  *pointer = memory;
  return cudaSuccess;
}

/* --- the device --- */

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice); }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDA_STUB_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  *value = device_attribute(attribute);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int device) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, DEVICE_NAME);
  properties->major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  properties->minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  properties->multiProcessorCount = device_attribute(cudaDevAttrMultiProcessorCount);
  properties->warpSize = device_attribute(cudaDevAttrWarpSize);
  properties->maxThreadsPerBlock = device_attribute(cudaDevAttrMaxThreadsPerBlock);
  properties->maxThreadsPerMultiProcessor = device_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->sharedMemPerBlock = device_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  properties->sharedMemPerBlockOptin = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  properties->sharedMemPerMultiprocessor = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  properties->totalGlobalMem = device_bytes();
  properties->l2CacheSize = 50 << 20;
  properties->maxGridSize[0] = MOST_BLOCKS_X;
  properties->maxGridSize[1] = properties->maxGridSize[2] = MOST_BLOCKS_YZ;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->textureAlignment = 512;
  properties->memoryBusWidth = 5120;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* name, int size, int device) {
  snprintf(name, size, "0000:00:00.0");
  return cudaSuccess;
}

cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the stand-in";
}
const char* cudaGetErrorName(cudaError_t error) { return "cudaErrorOfStub"; }

/* --- streams and events: all is done at once, so nothing ever waits --- */

static void* next_handle(void) {
  static uintptr_t handle = 0x1000;
  return (void*)__sync_add_and_fetch(&handle, 16);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = next_handle();
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* num_nodes) {
  if (status) *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = next_handle();
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  *ms = 0.5f;
  return cudaSuccess;
}

/* --- kernels --- */

static cudaError_t launch(dim3 grid, dim3 block) {
  if (launch_is_valid(grid.x, grid.y, grid.z, block.x, block.y, block.z)) return cudaSuccess;
  fprintf(stderr, "invalid launch: grid %u %u %u, block %u %u %u\n", grid.x, grid.y, grid.z, block.x, block.y, block.z);
  return failed(cudaErrorInvalidConfiguration);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(grid, block);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  return launch(config->gridDim, config->blockDim);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(grid, block);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}

static __thread struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed.grid = grid;
  pushed.block = block;
  pushed.shared = shared;
  pushed.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *(void**)stream = pushed.stream;
  return cudaSuccess;
}
void** __cudaRegisterFatBinary(void* binary) {
  static void* handle[4];
  return handle;
}

char __cudaInitModule(void** binary) { return 1; }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* kernel) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxDynamicSharedSizeBytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel, int threads,
                                                                   size_t shared, unsigned flags) {
  *blocks = 2;
  return cudaSuccess;
}

/* --- the driver's functions that torch asks the runtime for --- */

static int context_state(int device, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  *active = 1;
  return 0;
}
static int do_nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult* result) {
  *function = !strcmp(name, "cuDevicePrimaryCtxGetState") ? (void*)context_state
              : !strcmp(name, "cuDriverGetVersion")       ? (void*)cudaDriverGetVersion
                                                          : (void*)do_nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

/* --- cuBLAS: handles and answers that torch reads; products are left undone --- */

int cublasCreate_v2(void** handle) {
  *handle = next_handle();
  return 0;
}
int cublasGetMathMode(void* handle, int* mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void* handle, int* mode) { return *mode = 0; }
size_t cublasLtGetVersion(void) { return 130101; }
int cublasLtMatmulDescCreate(void** handle) { return cublasCreate_v2(handle); }
int cublasLtMatmulPreferenceCreate(void** handle) { return cublasCreate_v2(handle); }
int cublasLtMatrixLayoutCreate(void** handle) { return cublasCreate_v2(handle); }
int cublasLtMatmulAlgoGetHeuristic(void* handle, void* operation, void* a, void* b, void* c, void* d, void* preference,
                                   int requested, void* results, int* found) {
  *found = 1;
  return 0;
}

/* --- what the tests read --- */

size_t stub_pinned_bytes(void) { return bytes[HOST]; }
size_t stub_pinned_allocations(void) { return num_allocations[HOST]; }
