/* The device that runtime.c and driver.c speak of: an H100 as far as torch and Triton ask. */

#define DEVICE_NAME "NVIDIA H100 (a stand-in without a device)"
#define DEVICE_BYTES (80ull << 30)
#define CUDA_STUB_VERSION 13000
#define MOST_BLOCKS_X 2147483647u
#define MOST_BLOCKS_YZ 65535u

/* The driver and the runtime number the attributes alike. */
static int device_attribute(int attribute) {
  switch (attribute) {
    case 1: return 1024;            /* threads a block */
    case 5: return MOST_BLOCKS_X;
    case 6: case 7: return MOST_BLOCKS_YZ;
    case 8: return 48 << 10;        /* bytes of shared memory a block */
    case 10: return 32;             /* threads a warp */
    case 12: case 82: return 65536; /* registers a block, a multiprocessor */
    case 16: return 132;            /* multiprocessors */
    case 39: return 2048;           /* threads a multiprocessor */
    case 75: return 9;              /* compute capability 9.0 */
    case 76: return 0;
    case 81: return 228 << 10;      /* bytes of shared memory a multiprocessor */
    case 97: return 227 << 10;      /* bytes of shared memory a block, if asked for */
    default: return 1;
  }
}

static int launch_is_valid(unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y, unsigned z) {
  return grid_x && grid_y && grid_z && grid_x <= MOST_BLOCKS_X && grid_y <= MOST_BLOCKS_YZ &&
         grid_z <= MOST_BLOCKS_YZ && x * y * z <= 1024;
}
