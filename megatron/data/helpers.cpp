// Index building at memory speed. `tests/data/test_sample_index.py` holds the Python oracle of everything here.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

using Int32Array = py::array_t<std::int32_t, py::array::c_style>;

// A borrowed, checked view of a one-dimensional int32 array; usable without the GIL.
struct Int32View {
    const std::int32_t* data;
    std::int64_t size;

    std::int32_t operator[](std::int64_t i) const { return data[i]; }
};

Int32View view(const Int32Array& array, const char* name) {
    if (array.ndim() != 1) {
        throw std::invalid_argument(std::string(name) + " must have one dimension, not " + std::to_string(array.ndim()));
    }
    // Arrays inside a mapped .idx file start at byte 34: reading them as int32 would be undefined behaviour.
    if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(std::int32_t) != 0) {
        throw std::invalid_argument(std::string(name) + " must be aligned; pass a copy");
    }
    return {array.data(), static_cast<std::int64_t>(array.size())};
}

// Checking first, in a pass that the compiler vectorises, leaves the walk below without checks.
void require_range(Int32View values, std::int64_t low, std::int64_t high, const std::string& what) {
    const std::int32_t* end = values.data + values.size;
    std::int32_t smallest = std::numeric_limits<std::int32_t>::max();
    std::int32_t largest = std::numeric_limits<std::int32_t>::min();
    for (const std::int32_t* value = values.data; value != end; ++value) {
        smallest = std::min(smallest, *value);
        largest = std::max(largest, *value);
    }
    if (values.size > 0 && (smallest < low || largest >= high)) {
        const auto wrong = std::find_if(values.data, end, [=](std::int32_t v) { return v < low || v >= high; });
        throw std::out_of_range(what + " " + std::to_string(*wrong) + " at position " +
                                std::to_string(wrong - values.data) + " is not in [" + std::to_string(low) + ", " +
                                std::to_string(high) + ")");
    }
}

// Walks the documents once and notes where every `sequence_length`-th token lies.
template <typename Index>
void fill_sample_index(Int32View sizes, Int32View documents, std::int64_t sequence_length, std::int64_t num_tokens,
                       std::int64_t num_samples, Index* out) {
    // The order of `documents` is random, so that nearly every look-up of a size misses the cache.
    constexpr std::int64_t kPrefetchDistance = 32;

    // By definition the first sample starts at (0, 0), also when the first documents are empty.
    *out++ = 0;
    *out++ = 0;
    std::int64_t position = -1;
    std::int64_t size = 0;
    std::int64_t end = 0;  // tokens in documents 0 .. position
    for (std::int64_t sample = 1; sample <= num_samples; ++sample) {
        // The boundary token is the last label of one sample and the first input of the next. Only the last
        // boundary can be short of a full sample: it is the last token then.
        const std::int64_t token = std::min(sample * sequence_length, num_tokens - 1);
        while (end <= token) {
            if (++position == documents.size) {
                throw std::invalid_argument("the documents hold " + std::to_string(end) + " tokens, fewer than " +
                                            "num_tokens = " + std::to_string(num_tokens));
            }
            if (position + kPrefetchDistance < documents.size) {
                __builtin_prefetch(sizes.data + documents[position + kPrefetchDistance]);
            }
            size = sizes[documents[position]];
            end += size;
        }
        *out++ = static_cast<Index>(position);
        *out++ = static_cast<Index>(token - (end - size));
    }
}

template <typename Index>
py::array_t<Index> sample_index_as(Int32View sizes, Int32View documents, std::int64_t sequence_length,
                                   std::int64_t num_tokens, std::int64_t num_samples) {
    py::array_t<Index> result({static_cast<py::ssize_t>(num_samples + 1), static_cast<py::ssize_t>(2)});
    Index* out = result.mutable_data();
    {
        py::gil_scoped_release release;
        require_range(sizes, 0, std::int64_t{std::numeric_limits<std::int32_t>::max()} + 1, "size");
        require_range(documents, 0, sizes.size, "document");
        fill_sample_index(sizes, documents, sequence_length, num_tokens, num_samples, out);
    }
    return result;
}

py::array build_sample_index(const Int32Array& sizes, const Int32Array& document_index, std::int64_t sequence_length,
                             std::int64_t num_tokens, bool drop_last_partial, bool wide) {
    const Int32View sizes_view = view(sizes, "sizes");
    const Int32View documents = view(document_index, "document_index");
    if (sequence_length < 1 || sequence_length > std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument("sequence_length = " + std::to_string(sequence_length) + " is not in [1, 2^31)");
    }
    if (num_tokens < 1) {
        throw std::invalid_argument("num_tokens = " + std::to_string(num_tokens) + " must be at least 1");
    }
    if (!wide && documents.size > std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument("a document_index of " + std::to_string(documents.size) + " entries needs wide=True");
    }
    // Sample k covers tokens k * s .. (k + 1) * s inclusive: s inputs and, one further, s labels.
    const std::int64_t num_full = (num_tokens - 1) / sequence_length;
    const bool has_partial = (num_tokens - 1) % sequence_length != 0;
    const std::int64_t num_samples = num_full + (has_partial && !drop_last_partial ? 1 : 0);
    // Refused before the result is allocated, so that a wrong num_tokens cannot ask for any amount of memory.
    const std::int64_t most_tokens = std::int64_t{std::numeric_limits<std::int32_t>::max()} * documents.size;
    if (num_tokens > most_tokens) {
        throw std::invalid_argument("num_tokens = " + std::to_string(num_tokens) + " is more than " +
                                    std::to_string(documents.size) + " documents can hold");
    }
    if (wide) {
        return sample_index_as<std::int64_t>(sizes_view, documents, sequence_length, num_tokens, num_samples);
    }
    return sample_index_as<std::int32_t>(sizes_view, documents, sequence_length, num_tokens, num_samples);
}

}  // namespace

PYBIND11_MODULE(helpers, module) {
    module.doc() = "C++ index building for the datasets of megatron.data.";
    module.def("build_sample_index", &build_sample_index, py::arg("sizes").noconvert(),
               py::arg("document_index").noconvert(), py::kw_only(), py::arg("sequence_length"), py::arg("num_tokens"),
               py::arg("drop_last_partial") = true, py::arg("wide") = false,
               R"(Return where each sample begins: [num_samples + 1, 2] of (position in document_index, offset in it).

sizes: int32 [n], tokens per document. document_index: int32 [m], the documents in the order they are read, which
hold num_tokens tokens. Sample k is sequence_length + 1 tokens from row k up to and including row k + 1; neighbours
share one token. With drop_last_partial=False a shorter last sample is kept. int32, or int64 with wide=True.
Releases the GIL. Raises ValueError or IndexError on input that contradicts itself.)");
}
