// The fused decoder as Python sees it. Argument checks are here and in native/fused.py.
#include <nanobind/stl/string.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "fused_decode.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace cachegen {
namespace {

KVType type_of(const std::string& name) {
    if (name == "float16") return KVType::Float16;
    if (name == "bfloat16") return KVType::BFloat16;
    require(name == "float32", "element type");
    return KVType::Float32;
}

// Tuples as native/fused.py makes them; the arrays stay alive as long as this does.
class GroupReader {
public:
    FusedGroup read(const nb::tuple& fields, KVType type) {
        FusedGroup group{};
        group.tokens = nb::cast<uint64_t>(fields[0]);
        group.channels = nb::cast<uint64_t>(fields[1]);
        for (const nb::handle entry : nb::cast<nb::sequence>(fields[2])) {
            const auto pass = nb::cast<nb::tuple>(entry);
            const auto kind = nb::cast<unsigned>(pass[0]);
            require(kind <= static_cast<unsigned>(PassKind::Packed), "kind of a pass");
            group.passes.push_back({static_cast<PassKind>(kind), view<uint8_t>(pass[1])});
        }
        group.classes = view<uint8_t>(fields[3]);
        const auto scaling = view<float>(fields[4]);
        require(scaling.size() == 5, "scaling");
        const auto late_below = nb::cast<int>(fields[5]);
        group.key_scaling = {late_below, scaling[0], scaling[1]};
        group.value_scaling = {late_below, scaling[2], scaling[3]};
        group.value_factor = scaling[4];
        group.early_offset = view<float>(fields[6]);
        group.late_offset = view<float>(fields[7]);
        group.mean = view<float>(fields[8]);
        group.exempt_tokens = view<uint32_t>(fields[9]);
        const auto rows = view<uint8_t>(fields[10]);
        const size_t width = type == KVType::Float32 ? 4 : 2;
        require(rows.size() == group.exempt_tokens.size() * group.channels * width, "exempt rows");
        group.exempt_rows = reinterpret_cast<const std::byte*>(rows.data());
        for (const nb::handle entry : nb::cast<nb::sequence>(fields[11])) {
            const auto plane = nb::cast<nb::tuple>(entry);
            const auto offsets = view<int64_t>(plane[1]);
            require(offsets.size() == group.tokens, "offsets");
            group.planes.push_back({reinterpret_cast<std::byte*>(nb::cast<uintptr_t>(plane[0])),
                                    offsets.data(), nb::cast<int64_t>(plane[2]),
                                    nb::cast<uint32_t>(plane[3]), nb::cast<uint32_t>(plane[4]),
                                    nb::cast<int>(plane[5]), nb::cast<int64_t>(plane[6]),
                                    nb::cast<bool>(plane[7])});
        }
        return group;
    }

private:
    template <class T>
    std::span<const T> view(nb::handle array) {
        const auto typed = nb::cast<Vector<const T>>(array, /* convert = */ false);
        kept_.push_back(nb::borrow(array));
        return {typed.data(), typed.size()};
    }

    std::vector<nb::object> kept_;
};

void decode(const std::string& type, unsigned passes, const Tables& coarse, const Tables& refine,
            const nb::sequence& ropes, const nb::sequence& groups) {
    FusedDecode work{type_of(type), passes, coarse, refine, {}, {}};
    for (const nb::handle entry : ropes) {
        const auto fields = nb::cast<nb::tuple>(entry);
        const auto frequencies = nb::cast<Vector<const float>>(fields[0], false);
        work.ropes.push_back({{frequencies.data(), frequencies.data() + frequencies.size()},
                              nb::cast<float>(fields[1]), nb::cast<bool>(fields[2])});
    }
    GroupReader reader;
    for (const nb::handle entry : groups)
        work.groups.push_back(reader.read(nb::cast<nb::tuple>(entry), work.type));
    nb::gil_scoped_release release;
    decode_groups(work);
}

}  // namespace

void bind_fused(nb::module_& m) {
    m.def("decode_groups", decode, "type"_a, "passes"_a, "coarse"_a, "refine"_a, "ropes"_a,
          "groups"_a);
}

}  // namespace cachegen
