// The kernels on the emulated machine, as Python's module and the launchers of cuda/launch.h call them.
#pragma once

#include <string>

#include "crate/params.h"
#include "simt/machine.h"

namespace simt {

// False where no kernel serves the head.
bool run(const crate::AttentionForwardParams&, bool is_bf16, int width, int batch, const Options&, Counters&);
bool run(const crate::AttentionBackwardParams&, bool is_bf16, int width, int batch, const Options&, Counters&);

// `stream_format` is `format` or float32.
void run(const crate::LayerNormForwardParams&, int format, int stream_format, int blocks, const Options&, Counters&);
void run(const crate::LayerNormBackwardParams&, int stream_format, int blocks, const Options&, Counters&);
void run(const crate::ReduceRowsParams&, const Options&, Counters&);

// What a launcher of cuda/launch.h does here: the machine's error becomes the launcher's.
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
