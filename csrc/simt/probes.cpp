// Single primitives, for tests that compare the emulated machine with its specification.
#include "crate/primitives.h"
#include "simt/python.h"

namespace py = pybind11;

namespace simt {

using Words = py::array_t<uint32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

// One warp. Every lane has the registers a (32, 4), b (32, 2), c (32, 4) -> c (32, 4).
static Floats mma(const std::string& format, Words a, Words b, Floats c) {
    Floats out({32, 4});
    Counters counters;
    launch(1, 32, 0, {}, counters, [&] {
        const int lane = crate::lane_index();
        uint32_t left[4];
        float sum[4];
        for (int i = 0; i < 4; ++i) left[i] = a.at(lane, i), sum[i] = c.at(lane, i);
        if (is_bf16(format))
            crate::mma<crate::bf16>(sum, left, b.at(lane, 0), b.at(lane, 1));
        else
            crate::mma<crate::fp16>(sum, left, b.at(lane, 0), b.at(lane, 1));
        for (int i = 0; i < 4; ++i) out.mutable_at(lane, i) = sum[i];
    });
    return out;
}

// Shared memory holding `words`, one byte address per lane -> four registers a lane.
static Words load_matrix(Words words, Words address, bool transposed) {
    Words out({32, 4});
    Counters counters;
    launch(1, 32, uint32_t(words.size() * 4), {}, counters, [&] {
        const int lane = crate::lane_index();
        for (int i = lane; i < int(words.size()); i += 32) crate::store_shared(4 * i, words.at(i));
        crate::sync_warp();
        uint32_t r[4];
        if (transposed)
            crate::load_matrix_x4_transposed(r, address.at(lane));
        else
            crate::load_matrix_x4(r, address.at(lane));
        for (int i = 0; i < 4; ++i) out.mutable_at(lane, i) = r[i];
    });
    return out;
}

static Words transpose_matrix(Words in) {
    Words out(32);
    Counters counters;
    launch(1, 32, 0, {}, counters, [&] {
        out.mutable_at(crate::lane_index()) = crate::transpose_matrix(in.at(crate::lane_index()));
    });
    return out;
}

static Floats shuffle_xor(Floats in, int mask) {
    Floats out(32);
    Counters counters;
    launch(1, 32, 0, {}, counters, [&] {
        out.mutable_at(crate::lane_index()) = crate::shuffle_xor(in.at(crate::lane_index()), mask);
    });
    return out;
}

static bool warp_any(int lane) {
    bool any[32];
    Counters counters;
    launch(1, 32, 0, {}, counters, [&] { any[crate::lane_index()] = crate::warp_any(crate::lane_index() == lane); });
    for (bool a : any)
        if (a != any[0]) throw std::logic_error("lanes disagree");
    return any[0];
}

static uint32_t pack(const std::string& format, float lo, float hi) {
    return is_bf16(format) ? crate::pack<crate::bf16>(lo, hi) : crate::pack<crate::fp16>(lo, hi);
}
static std::pair<float, float> unpack(const std::string& format, uint32_t word) {
    float lo, hi;
    if (is_bf16(format))
        crate::unpack<crate::bf16>(word, lo, hi);
    else
        crate::unpack<crate::fp16>(word, lo, hi);
    return {lo, hi};
}

// Makes two cp.async groups and waits for all but `pending`. Then reads the first word of the group `read`.
static uint32_t copy_async(Words words, int pending, int read) {
    uint32_t value = 0;
    Counters counters;
    DeviceArray<uint32_t> global(words);
    launch(1, 32, 1024, {}, counters, [&] {
        for (int group = 0; group < 2; ++group) {
            crate::copy_async(512 * group + 16 * crate::lane_index(), global.data() + 128 * group + 4 * crate::lane_index());
            crate::commit_async();
        }
        pending == 0 ? crate::wait_async<0>() : crate::wait_async<1>();
        if (crate::lane_index() == 0) value = crate::load_shared<uint32_t>(512 * read);
        crate::wait_async<0>();
    });
    return value;
}

// Small kernels with one fault each; `none` has no fault. Two warps pass a value to each other through shared memory.
static std::vector<int> faulty(const std::string& fault, const Options& options) {
    std::vector<int> out(64);
    Counters counters;
    launch(1, 64, 64 * 4, options, counters, [&] {
        const int i = crate::thread_index(), other = 63 - i;
        if (fault == "divergence" && crate::lane_index() == 3) crate::warp_any(true);
        if (fault == "lost lane" && i == 5) return;
        crate::store_shared(4 * i + (fault == "misaligned" && i == 9 ? 2 : 0), 1000 + i);
        if (fault == "lost thread" && i < 32) return;
        if (fault == "warp barrier only")
            crate::sync_warp();
        else if (fault != "no barrier")
            crate::sync_block();
        crate::shuffle_xor(0.0f, 1);
        out[i] = crate::load_shared<int>(4 * (fault == "out of bounds" && i == 0 ? 64 : other));
    });
    return out;
}

// The counters of a warp that stores words `stride` bytes apart.
static Counters strided_store(int stride) {
    Counters counters;
    Options options;
    options.count_banks = true;
    launch(1, 32, uint32_t(32 * stride), options, counters, [&] { crate::store_shared(stride * crate::lane_index(), 1); });
    return counters;
}

void bind_probes(py::module_& m) {
    m.def("mma", &mma);
    m.def("load_matrix", &load_matrix);
    m.def("transpose_matrix", &transpose_matrix);
    m.def("shuffle_xor", &shuffle_xor);
    m.def("warp_any", &warp_any);
    m.def("pack", &pack);
    m.def("unpack", &unpack);
    m.def("copy_async", &copy_async);
    m.def("faulty", &faulty, py::arg("fault"), py::arg("options") = Options());
    m.def("strided_store", &strided_store);
}

}  // namespace simt
