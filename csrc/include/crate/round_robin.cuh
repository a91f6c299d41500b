// Who meets whom. The rows of a head are dealt to the warps in equal bands, and every pair of bands must meet once:
// what they compute together, the scores, is the same for both. In step k warp i computes the pair (i, i + k) and hands
// the transposed result to warp i + k, so each step gives every warp one pair to compute, one result to use and one to
// take. Half as many steps as warps meet all pairs; with an even number of warps the last step pairs them twice over,
// and only its first half computes.
#pragma once

#include "crate/primitives.h"

namespace crate {

struct RoundRobin {
    int warps, warp;

    CRATE_DEVICE bool meets(int step) const { return 2 * step <= warps; }  // step 0 is a band with itself
    CRATE_DEVICE int partner(int step) const { return warp + step < warps ? warp + step : warp + step - warps; }
    CRATE_DEVICE int giver(int step) const { return warp >= step ? warp - step : warp - step + warps; }
    CRATE_DEVICE bool computes(int step, int who) const { return step == 0 || 2 * step != warps || who < step; }
};

}  // namespace crate
