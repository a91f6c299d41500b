// The kernels on the emulated machine. Python's module and the launchers of cuda/launch.h call them.
#pragma once

#include <string>

#include "crate/params.h"
#include "simt/machine.h"

namespace simt {

// Returns false if there is no kernel for the head.
bool run(const crate::AttentionForwardParams&, bool is_bf16, int width, int batch, const Options&, Counters&);
bool run(const crate::AttentionBackwardParams&, bool is_bf16, int width, int batch, const Options&, Counters&);

// `stream_format` is `format` or float32.
void run(const crate::LayerNormForwardParams&, int format, int stream_format, int blocks, const Options&, Counters&);
void run(const crate::LayerNormBackwardParams&, int stream_format, int blocks, const Options&, Counters&);
void run(const crate::ReduceRowsParams&, const Options&, Counters&);

// Replaces a launcher of cuda/launch.h: the machine's error becomes the launcher's error.
template <class F>
const char* guarded(F f) {
    static thread_local std::string text;
    try {
        Counters counters;
        return f(Options(), counters);
    } catch (const std::exception& error) {
        text = error.what();
        return text.c_str();
    }
}

}  // namespace simt
