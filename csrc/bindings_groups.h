// Tuples of native/fused.py as the core's structures.
#pragma once

#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "format.h"
#include "fused_decode.h"

namespace cachegen {
namespace {

namespace nb = nanobind;

// Tuples as native/fused.py makes them; the arrays stay alive as long as this does.
class GroupReader {
public:
    FusedGroup read(const nb::tuple& fields, KVType stored) {
        FusedGroup group{};
        group.tokens = nb::cast<uint64_t>(fields[0]);
        group.channels = nb::cast<uint64_t>(fields[1]);
        read_passes(nb::cast<nb::sequence>(fields[2]), group);
        if (nb::isinstance<nb::tuple>(fields[3])) {  // with a profile: classes, and where to
            const auto to = nb::cast<nb::tuple>(fields[3]);
            const auto out = nb::cast<Matrix<float>>(to[1], false);
            const auto used = nb::cast<Vector<uint8_t>>(to[2], false);
            group.side.classes = view<uint8_t>(to[0]);
            const Shape shape{group.tokens, group.channels};
            require(out.shape(0) == group.channels && used.size() == group.channels &&
                        out.shape(1) == shape.places() * kLanes, "coefficients");
            targets_.push_back({out.data(), used.data(), nullptr});
            group.coefficients = &targets_.back();
        } else {
            group.side = parse_side(view<uint8_t>(fields[3]), group.tokens, group.channels, stored,
                                    /* plain = */ true);
        }
        read_constants(nb::cast<nb::tuple>(fields[4]), group);
        for (const nb::handle entry : nb::cast<nb::sequence>(fields[5])) {
            group.planes.push_back(read_plane(nb::cast<nb::tuple>(entry), group.tokens));
        }
        return group;
    }

    void read_passes(const nb::sequence& passes, FusedGroup& group) {
        for (const nb::handle entry : passes) {
            const auto pass = nb::cast<nb::tuple>(entry);
            const auto kind = nb::cast<unsigned>(pass[0]);
            require(kind <= static_cast<unsigned>(PassKind::Sparse), "kind of a pass");
            group.passes.push_back({static_cast<PassKind>(kind), view<uint8_t>(pass[1])});
        }
    }

    void read_constants(const nb::tuple& constants, FusedGroup& group) {
        const auto scaling = view<float>(constants[1]);
        require(scaling.size() == 5, "scaling");
        const auto late_below = nb::cast<int>(constants[0]);
        group.key_scaling = {late_below, scaling[0], scaling[1]};
        group.value_scaling = {late_below, scaling[2], scaling[3]};
        group.value_factor = scaling[4];
        group.early_offset = view<float>(constants[2]);
        group.late_offset = view<float>(constants[3]);
    }

    RopeKind read_rope(const nb::tuple& fields) {
        const auto frequencies = nb::cast<Vector<const float>>(fields[0], false);
        return {{frequencies.data(), frequencies.data() + frequencies.size()},
                nb::cast<float>(fields[1]), nb::cast<bool>(fields[2])};
    }

    PlaneTarget read_plane(const nb::tuple& plane, uint64_t tokens) {
        const auto offsets = view<int64_t>(plane[1]);
        require(offsets.size() == tokens, "offsets");
        return {reinterpret_cast<std::byte*>(nb::cast<uintptr_t>(plane[0])),
                offsets.data(), nb::cast<int64_t>(plane[2]),
                nb::cast<uint32_t>(plane[3]), nb::cast<uint32_t>(plane[4]),
                nb::cast<int>(plane[5]), nb::cast<int64_t>(plane[6]),
                nb::cast<bool>(plane[7])};
    }

    // Groups share many arrays, and looking into one takes long.
    template <class T>
    std::span<const T> view(nb::handle array) {
        if constexpr (sizeof(T) == 1) {
            // Bodies of segments: each is a view of its own, which the caller's tuples keep alive.
            if (PyMemoryView_Check(array.ptr())) {
                const Py_buffer* const buffer = PyMemoryView_GET_BUFFER(array.ptr());
                require(buffer->itemsize == 1 && buffer->ndim == 1 &&
                            PyBuffer_IsContiguous(buffer, 'C'), "bytes");
                return {static_cast<const T*>(buffer->buf), static_cast<size_t>(buffer->len)};
            }
        }
        auto [known, is_new] = views_.try_emplace({array.ptr(), sizeof(T)});
        if (is_new) {
            const auto typed = nb::cast<Vector<const T>>(array, /* convert = */ false);
            kept_.push_back(nb::borrow(array));
            known->second = {typed.data(), typed.size()};
        }
        return {static_cast<const T*>(known->second.first), known->second.second};
    }

private:
    std::vector<nb::object> kept_;
    // By array and size of its elements; those of one size are of one type in what is read here.
    std::map<std::pair<PyObject*, size_t>, std::pair<const void*, size_t>> views_;
    std::deque<ComponentTarget> targets_;
};

}  // namespace
}  // namespace cachegen
