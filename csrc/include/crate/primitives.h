// All functions of the machine that a kernel may use. Kernels include this header and nothing of CUDA, so the same
// source is compiled twice. With nvcc each function is one or two PTX instructions. With the host compiler each
// function is a call into the emulator of csrc/simt. Both headers declare exactly these functions, in namespace crate:
//
//   thread_index() warp_index() lane_index() block_index() block_threads()
//   warp_index_again()                           the same as warp_index(), but held in no register until here
//   sync_block()  sync_warp()                    barriers; sync_warp also orders shared memory within the warp
//   shuffle_xor(v, mask)  warp_any(bool)         warp exchange and vote; all 32 lanes take part
//   SharedAddress, shared_base()                 byte address in the dynamic shared memory of the block
//   load_shared<T>(a)  store_shared(a, v)        T of 4, 8 or 16 bytes, naturally aligned
//   load_global(p)  store_global(p, v)           plain global accesses
//   copy_async(a, p)  commit_async()  wait_async<n>()    16 bytes global -> shared (cp.async) and its groups
//   load_matrix_x4(r, a)  load_matrix_x4_transposed(r, a)    ldmatrix: lane l gives the address of row l
//   transpose_matrix(r)                          movmatrix: an 8x8 tile held by the warp, transposed
//   mma<T>(c, a, b)                              c += a b, m16n8k16, 16-bit operands, fp32 accumulation
//   pack<T>(lo, hi)  unpack<T>(v, lo, hi)        two fp32 <-> one 32-bit word of two 16-bit numbers, round to nearest
//   exp2_approx(x)  log2_approx(x)  rsqrt_approx(x)  reciprocal_approx(x)
//   at_most_zero(x)                              the smaller of x and 0; NaN stays
//
// The warp collectives (shuffle, vote, ldmatrix, movmatrix, mma) must be reached by all 32 lanes of a warp.
#pragma once

#include <type_traits>

#include "crate/numeric.h"

#ifdef __CUDACC__
#define CRATE_DEVICE __device__ __forceinline__
#define CRATE_HOST_DEVICE __host__ __device__ __forceinline__
#define CRATE_UNROLL _Pragma("unroll")
#define CRATE_NO_UNROLL _Pragma("unroll 1")
#include "crate/primitives_ptx.h"
#else
#define CRATE_DEVICE inline
#define CRATE_HOST_DEVICE inline
#define CRATE_UNROLL
#define CRATE_NO_UNROLL
#include "simt/primitives.h"
#endif
