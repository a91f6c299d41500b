// Calls the CPU library with random shapes, types and strides, on several threads, with buffers of exactly their size on
// the heap. Built with a sanitizer, it ends with an error at the first access beyond a buffer or race. Every result must
// be finite, and equal to that of one thread. Float32 results must equal the equations in double; the other types and
// the gradients have their tests in Python.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "interface.h"

using namespace crate;

extern "C" {
const char* crate_cpu_open(ParallelFor, GetNumThreads, const char*);
int32_t crate_cpu_attention_forward(const AttentionForward*);
int32_t crate_cpu_attention_backward(const AttentionBackward*);
int32_t crate_cpu_layer_forward(const LayerForward*);
int32_t crate_cpu_layer_backward(const LayerBackward*);
int32_t crate_cpu_overcomplete_forward(const OvercompleteForward*);
int32_t crate_cpu_overcomplete_backward(const OvercompleteBackward*);
int64_t crate_cpu_packed_bytes(const PackedSize*);
int32_t crate_cpu_pack(const Pack*);
}

static std::mt19937 random_bits(0);
static int threads = 1;

static int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

static int32_t run_on_threads(int64_t begin, int64_t end, int64_t, RangeFunction f, void* context) {
    std::vector<std::thread> running;
    const int64_t share = (end - begin + threads - 1) / threads;
    for (int64_t i = begin; i < end; i += share)
        running.emplace_back(f, i, i + share < end ? i + share : end, context);
    for (std::thread& t : running) t.join();
    return 0;
}

static uint16_t bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t(bits >> 16);
}

// A tensor of exactly its size; random small numbers, or NaN where it is to be written.
struct Tensor {
    int64_t type, columns;
    std::vector<char> bytes;
    Tensor(int64_t rows, int64_t width, int64_t kind, bool output = false)
        : type(kind), columns(width), bytes(size_t(rows * width) * (kind == kFloat32 ? 4 : 2)) {
        std::normal_distribution<float> normal(0, 0.5f);
        for (int64_t i = 0; i < rows * width; ++i) {
            const float x = output ? NAN : normal(random_bits);
            if (kind == kFloat32) std::memcpy(&bytes[i * 4], &x, 4);
            const uint16_t half = kind == kBfloat16 ? bfloat16(x) : output ? 0x7e00 : uint16_t(pick(0x2000, 0x3a00));
            if (kind != kFloat32) std::memcpy(&bytes[i * 2], &half, 2);
        }
    }
    operator Array() const { return {bytes.data(), type, columns}; }
    operator MutableArray() { return {bytes.data(), type, columns}; }
    float* floats() { return reinterpret_cast<float*>(bytes.data()); }
    void check(const char* name) const {
        for (size_t i = 0; i < bytes.size() / (type == kFloat32 ? 4 : 2); ++i) {
            float x;
            uint16_t half;
            std::memcpy(&half, &bytes[type == kFloat32 ? 0 : i * 2], 2);
            uint32_t wide = uint32_t(half) << 16;
            std::memcpy(&x, &wide, 4);
            if (type == kFloat32) std::memcpy(&x, &bytes[i * 4], 4);
            const bool finite = type == kFloat16 ? (half & 0x7c00) != 0x7c00 : std::isfinite(x);
            if (!finite) {
                std::fprintf(stderr, "%s[%zu] is not finite\n", name, i);
                std::exit(1);
            }
        }
    }
};

static Heads heads_of(Tensor& t, const AttentionShape& s) {
    return {t.bytes.data(), t.type, s.tokens * s.heads * s.width, s.heads * s.width, s.width};
}

static void compare(const char* name, int64_t at, float got, double expected) {
    if (std::fabs(got - expected) <= 2e-4 * (1 + std::fabs(expected))) return;
    std::fprintf(stderr, "%s[%lld] is %g, not %g\n", name, (long long)at, got, expected);
    std::exit(1);
}

// The attention of one query in double: weights over the keys that it sees, then their mean of the values.
static std::vector<double> attend(const AttentionShape& s, int64_t batch, int64_t query, const double* q, const double* keys,
                                  const double* values, int64_t stride) {
    const int64_t visible = s.lengths == nullptr ? s.tokens : static_cast<const int64_t*>(s.lengths)[batch];
    const int64_t seen = s.causal && query + 1 < visible ? query + 1 : visible;
    std::vector<double> scores(seen), out(s.width, 0.0);
    double most = -INFINITY, total = 0;
    for (int64_t j = 0; j < seen; ++j) {
        for (int64_t k = 0; k < s.width; ++k) scores[j] += q[k] * keys[j * stride + k] * s.scale;
        most = std::fmax(most, scores[j]);
    }
    for (double& x : scores) total += x = std::exp(x - most);
    for (int64_t j = 0; j < seen; ++j)
        for (int64_t k = 0; k < s.width; ++k) out[k] += scores[j] / total * values[j * stride + k];
    return out;
}

static std::vector<double> doubles(Tensor& t, int64_t count) { return std::vector<double>(t.floats(), t.floats() + count); }

static std::vector<double> normalized(const std::vector<double>& x, int64_t d, Tensor& gamma, Tensor& beta) {
    std::vector<double> out(x.size());
    for (size_t row = 0; row < x.size(); row += d) {
        double mean = 0, variance = 0;
        for (int64_t k = 0; k < d; ++k) mean += x[row + k] / d;
        for (int64_t k = 0; k < d; ++k) variance += (x[row + k] - mean) * (x[row + k] - mean) / d;
        for (int64_t k = 0; k < d; ++k)
            out[row + k] = (x[row + k] - mean) / std::sqrt(variance + 1e-5) * gamma.floats()[k] + beta.floats()[k];
    }
    return out;
}

// a (rows, depth) times b (columns, depth) transposed; `transposed`: b is (depth, columns).
static std::vector<double> times(const std::vector<double>& a, Tensor& b, int64_t depth, int64_t columns, bool transposed) {
    const int64_t rows = int64_t(a.size()) / depth;
    std::vector<double> out(rows * columns, 0.0);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            for (int64_t k = 0; k < depth; ++k)
                out[i * columns + j] += a[i * depth + k] * b.floats()[transposed ? k * columns + j : j * depth + k];
    return out;
}

static void layer() {
    const int64_t stream = pick(0, 2), low = pick(0, 1), matrix = low ? int64_t(kBfloat16) : stream;
    const int64_t batch = pick(1, 3), tokens = pick(0, 3) ? pick(1, 40) : pick(90, 210), heads = pick(1, 3), p = pick(1, 40);
    const int64_t d = pick(0, 3) ? pick(1, 70) : pick(100, 200), inner = heads * p, rows = batch * tokens;
    const bool identity = pick(0, 3) == 0 && inner == d, bias = !identity && pick(0, 1), packed = pick(0, 1);
    std::vector<int64_t> lengths;
    for (int64_t i = 0; i < batch; ++i) lengths.push_back(pick(1, tokens));
    const AttentionShape attention = {batch, tokens, heads, p, pick(0, 1) ? lengths.data() : nullptr, pick(0, 1),
                                      1 / std::sqrt(double(p)), low, 0};
    Tensor z(rows, d, stream), g(rows, d, stream), n1(1, d, kFloat32), b1(1, d, kFloat32), n2(1, d, kFloat32), b2(1, d, kFloat32);
    Tensor u(inner, d, matrix), o_weight(d, inner, matrix), o_bias(1, d, matrix), dictionary(d, d, matrix);
    Tensor w(rows, inner, matrix, true), o(rows, inner, matrix, true), lse(batch * heads, tokens, kFloat32, true);
    Tensor middle(rows, d, matrix, true), out(rows, d, stream, true), again(rows, d, stream, true);
    Tensor m1(1, rows, kFloat32, true), r1(1, rows, kFloat32, true), m2(1, rows, kFloat32, true), r2(1, rows, kFloat32, true);
    const Array none = {nullptr, 0, 0};
    LayerForward f{};
    f.shape = {attention, d, pick(0, 1) ? 1.0 : -1.0, 0.1, 0.1};
    f.weights = {{n1, b1, 1e-5}, u, identity ? none : Array(o_weight), bias ? Array(o_bias) : none, {n2, b2, 1e-5}, dictionary,
                 none, nullptr, nullptr, nullptr};
    const PackedSize size = {d, inner, low};
    std::vector<char> memory(size_t(crate_cpu_packed_bytes(&size)));
    if (packed) {
        const Pack pack = {u, 1, d, inner, low, memory.data()};
        if (crate_cpu_pack(&pack)) std::exit(1);
        f.weights.packed_projection = memory.data();
    }
    f.halves = 3;
    f.z = z, f.w = w, f.o = o, f.lse = lse.floats(), f.middle = middle, f.out = out;
    f.mean_1 = m1.floats(), f.rstd_1 = r1.floats(), f.mean_2 = m2.floats(), f.rstd_2 = r2.floats();
    threads = int(pick(1, 4));
    if (crate_cpu_layer_forward(&f)) std::exit(1);
    for (auto* t : {&w, &o, &lse, &middle, &out, &m1, &r1, &m2, &r2}) t->check("forward");
    if (stream == kFloat32 && matrix == kFloat32) {  // equations 11 and 12 of arXiv 2306.01129, with LayerNorms
        std::vector<double> x = doubles(z, rows * d), projected = times(normalized(x, d, n1, b1), u, d, inner, false);
        std::vector<double> attended(rows * inner);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t h = 0; h < heads; ++h) {
                const double* sequence = &projected[i / tokens * tokens * inner + h * p];
                const std::vector<double> head =
                    attend(attention, i / tokens, i % tokens, &projected[i * inner + h * p], sequence, sequence, inner);
                std::copy(head.begin(), head.end(), &attended[i * inner + h * p]);
            }
        if (!identity) attended = times(attended, o_weight, inner, d, false);
        for (int64_t i = 0; i < rows * d; ++i)
            x[i] += f.shape.mssa_step_size * (attended[i] + (bias ? o_bias.floats()[i % d] : 0));
        x = normalized(x, d, n2, b2);
        std::vector<double> residual = times(x, dictionary, d, d, false);
        residual = times(residual, dictionary, d, d, true);
        const std::vector<double> step = times(x, dictionary, d, d, true);
        for (int64_t i = 0; i < rows * d; ++i)
            compare("layer", i, out.floats()[i],
                    std::fmax(x[i] + f.shape.step_size * (step[i] - residual[i]) - f.shape.step_size * f.shape.lambd, 0));
    }
    LayerForward unsaved = f;
    unsaved.out = again, unsaved.lse = nullptr, unsaved.middle = {nullptr, 0, 0};
    unsaved.w.data = unsaved.o.data = nullptr;
    unsaved.mean_1 = unsaved.rstd_1 = unsaved.mean_2 = unsaved.rstd_2 = nullptr;
    threads = 1;
    if (crate_cpu_layer_forward(&unsaved)) std::exit(1);
    if (again.bytes != out.bytes) std::fprintf(stderr, "the result depends on threads or on what is saved\n"), std::exit(1);

    Tensor dz(rows, d, stream, true), dn1(1, d, kFloat32, true), db1(1, d, kFloat32, true), dn2(1, d, kFloat32, true);
    Tensor db2(1, d, kFloat32, true), du(inner, d, matrix, true), dow(d, inner, matrix, true), dob(1, d, matrix, true);
    Tensor dd(d, d, matrix, true);
    LayerBackward b{};
    b.shape = f.shape, b.weights = f.weights, b.halves = 3;
    b.weights.packed_projection = nullptr;
    b.grad = g, b.out = out, b.z = z, b.w = w, b.o = o, b.lse = lse.floats(), b.middle = middle;
    b.mean_1 = m1.floats(), b.rstd_1 = r1.floats(), b.mean_2 = m2.floats(), b.rstd_2 = r2.floats();
    b.dz = dz, b.dmssa_norm_weight = dn1, b.dmssa_norm_bias = db1, b.dprojection = du;
    if (!identity) b.doutput = dow;
    if (bias) b.doutput_bias = dob;
    b.dista_norm_weight = dn2, b.dista_norm_bias = db2, b.ddictionary = dd;
    threads = int(pick(1, 4));
    if (crate_cpu_layer_backward(&b)) std::exit(1);
    for (auto* t : {&dz, &dn1, &db1, &dn2, &db2, &du, &dd}) t->check("backward");
    if (!identity) dow.check("dout_weight");
    if (bias) dob.check("dout_bias");
}

static void attention() {
    const int64_t type = pick(0, 2), batch = pick(1, 2), tokens = pick(0, 4) ? pick(1, 60) : pick(97, 330), heads = pick(1, 3);
    const int64_t p = pick(1, 70);
    std::vector<int64_t> lengths;
    for (int64_t i = 0; i < batch; ++i) lengths.push_back(pick(1, tokens));
    const bool separate = pick(0, 1), transposed = pick(0, 1);
    AttentionShape s = {batch, tokens, heads, p, pick(0, 1) ? lengths.data() : nullptr, pick(0, 1), 1 / std::sqrt(double(p)), 0, 0};
    Tensor w(batch * tokens * heads, p, type), v(batch * tokens * heads, p, type), g(batch * tokens * heads, p, type);
    Tensor o(batch * tokens * heads, p, type, true), lse(batch * heads, tokens, kFloat32, true);
    Tensor dw(batch * tokens * heads, p, type, true), dv(batch * tokens * heads, p, type, true);
    const bool wide = pick(0, 5) == 0 && type == kFloat32;
    if (wide)  // norms so different that the symmetric softmax would underflow
        for (int64_t i = 0; i < p; ++i) w.floats()[i] *= 100;
    Heads w_heads = heads_of(w, s), v_heads = heads_of(v, s);
    if (transposed) w_heads.token_stride = p, w_heads.head_stride = tokens * p;
    if (!separate) v_heads = Heads{};
    threads = int(pick(1, 4));
    const AttentionForward f = {s, w_heads, v_heads, heads_of(o, s), lse.floats()};
    if (crate_cpu_attention_forward(&f)) std::exit(1);
    const AttentionBackward b = {s, w_heads, v_heads, heads_of(g, s), heads_of(o, s), lse.floats(), heads_of(dw, s),
                                 separate ? heads_of(dv, s) : Heads{}};
    if (crate_cpu_attention_backward(&b)) std::exit(1);
    for (auto* t : {&o, &lse, &dw}) t->check("attention");
    if (type == kFloat32) {
        const std::vector<double> keys = doubles(w, batch * tokens * heads * p);
        const std::vector<double> values = doubles(separate ? v : w, batch * tokens * heads * p);
        for (int64_t i = 0; i < batch * tokens * heads; ++i) {
            const int64_t b = i / (tokens * heads), token = i / heads % tokens, head = i % heads;
            const auto first = [&](bool by_head, int64_t t) {
                return b * tokens * heads * p + (by_head ? (head * tokens + t) * p : (t * heads + head) * p);
            };
            // Values that are w lie like w.
            std::vector<double> k(tokens * p), x(tokens * p);
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t c = 0; c < p; ++c) {
                    k[t * p + c] = keys[first(transposed, t) + c];
                    x[t * p + c] = values[first(transposed && !separate, t) + c];
                }
            const std::vector<double> expected = attend(s, b, token, &k[token * p], k.data(), x.data(), p);
            for (int64_t c = 0; c < p; ++c) compare("attention", i, o.floats()[i * p + c], expected[c]);
        }
    }
    if (separate) dv.check("dvalue");
}

// Keys first, then queries, as one sequence: the queries' rows are those of the whole sequence with the keys visible.
static void cross_attention() {
    const int64_t type = pick(0, 2), batch = pick(1, 2), keys = pick(1, 130), queries = pick(1, 130), heads = pick(1, 2);
    const int64_t p = pick(1, 40), tokens = keys + queries;
    std::vector<int64_t> lengths;
    for (int64_t i = 0; i < batch; ++i) lengths.push_back(pick(1, keys));
    AttentionShape s = {batch, tokens, heads, p, pick(0, 1) ? lengths.data() : nullptr, 0, 0.3, 0, keys};
    Tensor w(batch * tokens * heads, p, type), g(batch * tokens * heads, p, type), lse(batch * heads, tokens, kFloat32);
    Tensor o(batch * queries * heads, p, type, true), dw(batch * tokens * heads, p, type, true);
    const int64_t size = type == kFloat32 ? 4 : 2;
    Heads out = {o.bytes.data() - keys * heads * p * size, type, queries * heads * p, heads * p, p};
    for (int64_t b = 0; b < batch; ++b)
        std::memset(g.bytes.data() + b * tokens * heads * p * size, 0, size_t(keys * heads * p * size));
    threads = int(pick(1, 4));
    const AttentionForward f = {s, heads_of(w, s), Heads{}, out, lse.floats()};
    if (crate_cpu_attention_forward(&f)) std::exit(1);
    o.check("cross attention");
    if (type == kFloat32) {
        const std::vector<double> x = doubles(w, batch * tokens * heads * p);
        AttentionShape naive = s;
        const std::vector<int64_t> all(batch, keys);
        if (s.lengths == nullptr) naive.lengths = all.data();
        for (int64_t i = 0; i < batch * queries * heads; ++i) {
            const int64_t b = i / (queries * heads), query = keys + i / heads % queries;
            const double* sequence = &x[(b * tokens * heads + i % heads) * p];
            const std::vector<double> expected =
                attend(naive, b, query, sequence + query * heads * p, sequence, sequence, heads * p);
            for (int64_t c = 0; c < p; ++c) compare("cross attention", i, o.floats()[i * p + c], expected[c]);
        }
    }
    Tensor whole(batch * tokens * heads, p, type);  // the backward reads the rows of queries alone
    for (int64_t b = 0; b < batch; ++b)
        std::memcpy(whole.bytes.data() + (b * tokens + keys) * heads * p * size,
                    o.bytes.data() + b * queries * heads * p * size, size_t(queries * heads * p * size));
    const AttentionBackward b = {s, heads_of(w, s), Heads{}, heads_of(g, s), heads_of(whole, s), lse.floats(),
                                 heads_of(dw, s), Heads{}};
    if (crate_cpu_attention_backward(&b)) std::exit(1);
    dw.check("gradient of cross attention");
}

static void overcomplete() {
    const int64_t type = pick(0, 2), low = type == kBfloat16, n = pick(1, 120), d = pick(1, 50), m = pick(1, 160);
    Tensor x(n, d, type), g(n, d, type), D(d, m, type), D1(d, m, type), z1(n, m, type, true), z2(n, m, type, true);
    Tensor out(n, d, type, true), dx(n, d, type, true), dD(d, m, type, true), dD1(d, m, type, true);
    threads = int(pick(1, 4));
    const OvercompleteForward f = {n, d, m, 0.1, 0.1, low, x, D, D1, z1, z2, out};
    if (crate_cpu_overcomplete_forward(&f)) std::exit(1);
    const OvercompleteBackward b = {n, d, m, 0.1, low, g, x, D, D1, z1, z2, dx, dD, dD1};
    if (crate_cpu_overcomplete_backward(&b)) std::exit(1);
    for (auto* t : {&z1, &z2, &out, &dx, &dD, &dD1}) t->check("overcomplete");
}

int main(int count, char** arguments) {
    const char* isa = crate_cpu_open(run_on_threads, nullptr, count > 1 ? arguments[1] : nullptr);
    if (isa == nullptr) return std::fprintf(stderr, "this processor does not run the instruction set\n"), 77;
    const int rounds = count > 2 ? std::atoi(arguments[2]) : 50;
    for (int i = 0; i < rounds; ++i) layer(), attention(), cross_attention(), overcomplete();
    std::printf("%s: %d rounds\n", isa, rounds);
}
