// Sparse segments as Python sees them, for devices: places and symbols as pairs of 32-bit numbers.
#include <vector>

#include "bindings.h"
#include "sparse.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace cachegen {
namespace {

Shape shape_of(uint64_t tokens, uint64_t channels) {
    require(tokens == 0 || channels <= (uint64_t{1} << 32) / kLanes / Shape{tokens, 1}.places(),
            "places of 32 bits");
    return {tokens, channels};
}

nb::ndarray<nb::numpy, uint32_t, nb::ndim<2>> parse(const Vector<const uint8_t>& body,
                                                   uint64_t tokens, uint64_t channels,
                                                   unsigned largest) {
    const Shape shape = shape_of(tokens, channels);
    require(largest >= 1 && largest <= kMaxSymbol, "largest symbol");
    auto* const pairs = new std::vector<uint32_t>;
    const nb::capsule owner(pairs, [](void* p) noexcept {
        delete static_cast<std::vector<uint32_t>*>(p);
    });
    {
        nb::gil_scoped_release release;
        const auto symbols = parse_sparse({body.data(), body.size()}, shape, largest);
        pairs->reserve(2 * symbols.size());
        for (const SparseSymbol& one : symbols) {
            pairs->push_back(static_cast<uint32_t>(one.step * kLanes + one.lane));
            pairs->push_back(one.symbol);
        }
    }
    return {pairs->data(), {pairs->size() / 2, 2}, owner};
}

nb::bytes write(const Matrix<const uint32_t>& pairs, uint64_t tokens, uint64_t channels) {
    const Shape shape = shape_of(tokens, channels);
    require(pairs.shape(1) == 2 && pairs.shape(0) <= shape.steps(), "pairs");
    std::vector<SparseSymbol> symbols;
    symbols.reserve(pairs.shape(0));
    for (size_t i = 0; i < pairs.shape(0); ++i) {
        const uint32_t place = pairs.data()[2 * i], symbol = pairs.data()[2 * i + 1];
        const uint64_t step = place / kLanes;
        require(step < shape.steps() && place % kLanes < shape.active_lanes(step / channels),
                "places");
        require(i == 0 || place > pairs.data()[2 * i - 2], "order of places");
        require(symbol >= 1 && symbol <= kMaxSymbol, "symbols");
        symbols.push_back({step, static_cast<uint8_t>(place % kLanes),
                           static_cast<uint8_t>(symbol)});
    }
    const std::vector<uint8_t> body = write_sparse(symbols, shape);
    return nb::bytes(body.data(), body.size());
}

}  // namespace

void bind_sparse(nb::module_& m) {
    m.def("parse_sparse", parse, "body"_a.noconvert(), "tokens"_a, "channels"_a, "largest"_a);
    m.def("write_sparse", write, "pairs"_a.noconvert(), "tokens"_a, "channels"_a);
}

}  // namespace cachegen
