// Index building and reading at memory speed. The Python oracles: tests/data/test_sample_index.py, test_span.py,
// test_packing.py and test_pair_index.py.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "blend_index.h"

namespace py = pybind11;

namespace {

// A borrowed, checked view of a one-dimensional array; usable without the GIL. Arrays inside a mapped .idx file start
// at byte 34, so that nothing may be said about alignment: the copies are single instructions to the compiler.
template <typename Value>
class View {
  public:
    View(const py::array& array, const char* name) {
        if (array.ndim() != 1) {
            throw std::invalid_argument(std::string(name) + " must have one dimension, not " +
                                        std::to_string(array.ndim()));
        }
        if (!array.dtype().is(py::dtype::of<Value>()) && !array.dtype().equal(py::dtype::of<Value>())) {
            throw std::invalid_argument(std::string(name) + " must be " +
                                        std::string(py::str(py::dtype::of<Value>())) + ", not " +
                                        std::string(py::str(array.dtype())));
        }
        if (array.size() > 1 && array.strides(0) != static_cast<py::ssize_t>(sizeof(Value))) {
            throw std::invalid_argument(std::string(name) + " must be contiguous");
        }
        data_ = static_cast<const unsigned char*>(array.data());
        size = static_cast<std::int64_t>(array.size());
    }

    Value operator[](std::int64_t i) const {
        Value value;
        std::memcpy(&value, at(i), sizeof value);
        return value;
    }
    const unsigned char* at(std::int64_t i) const { return data_ + i * static_cast<std::int64_t>(sizeof(Value)); }

    std::int64_t size;

  private:
    const unsigned char* data_;
};

using Int32View = View<std::int32_t>;

// Checking first, in a pass that the compiler vectorises, leaves the walk below without checks.
void require_range(Int32View values, std::int64_t low, std::int64_t high, const std::string& what) {
    std::int32_t smallest = std::numeric_limits<std::int32_t>::max();
    std::int32_t largest = std::numeric_limits<std::int32_t>::min();
    for (std::int64_t i = 0; i < values.size; ++i) {
        smallest = std::min(smallest, values[i]);
        largest = std::max(largest, values[i]);
    }
    if (values.size == 0 || (smallest >= low && largest < high)) return;
    std::int64_t wrong = 0;
    while (values[wrong] >= low && values[wrong] < high) ++wrong;
    throw std::out_of_range(what + " " + std::to_string(values[wrong]) + " at position " + std::to_string(wrong) +
                            " is not in [" + std::to_string(low) + ", " + std::to_string(high) + ")");
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
                __builtin_prefetch(sizes.at(documents[position + kPrefetchDistance]));
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

py::array build_sample_index(const py::array& sizes, const py::array& document_index, std::int64_t sequence_length,
                             std::int64_t num_tokens, bool drop_last_partial, bool wide) {
    const Int32View sizes_view(sizes, "sizes");
    const Int32View documents(document_index, "document_index");
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

py::tuple build_blend_index(const std::vector<double>& weights, const std::vector<std::int64_t>& limits,
                            std::int64_t num_samples) {
    if (weights.empty() || weights.size() > std::numeric_limits<std::uint16_t>::max()) {
        throw std::invalid_argument(std::to_string(weights.size()) + " datasets are not in [1, 65535]");
    }
    if (limits.size() != weights.size()) {
        throw std::invalid_argument(std::to_string(limits.size()) + " limits for " + std::to_string(weights.size()) +
                                    " datasets");
    }
    std::int64_t room = 0;  // samples that all limits allow, counted up to num_samples
    for (std::size_t d = 0; d < weights.size(); ++d) {
        if (!(weights[d] >= 0.0 && weights[d] <= std::numeric_limits<double>::max())) {
            throw std::invalid_argument("weight " + std::to_string(weights[d]) + " is not a share");
        }
        if (weights[d] > 0.0) room += std::min(std::max<std::int64_t>(limits[d], 0), num_samples - room);
    }
    if (num_samples < 0 || room < num_samples) {
        throw std::invalid_argument(std::to_string(num_samples) + " samples are not in [0, " + std::to_string(room) +
                                    "], which is what the limits allow");
    }
    py::array_t<std::uint16_t> dataset_index(num_samples);
    py::array_t<std::int64_t> sample_index(num_samples);
    std::uint16_t* dataset = dataset_index.mutable_data();
    std::int64_t* sample = sample_index.mutable_data();
    {
        py::gil_scoped_release release;
        fill_blend_index(weights, limits, num_samples, dataset, sample);
    }
    return py::make_tuple(dataset_index, sample_index);
}

// Copies tokens [offset, ...) of the first sequence up to tokens [..., stop) of the last into `out`, whole ones between
// them, and notes where a sequence begins.
template <typename Token>
std::int64_t copy_span(const View<Token>& tokens, const View<std::int64_t>& pointers, const Int32View& lengths,
                       const Int32View& sequences, std::int64_t offset, std::int64_t stop, std::int64_t* out,
                       std::int64_t room, std::int32_t* starts, std::int64_t* num_starts) {
    std::int64_t filled = 0;
    for (std::int64_t i = 0; i < sequences.size; ++i, offset = 0) {
        const std::int32_t sequence = sequences[i];
        if (sequence < 0 || sequence >= lengths.size) {
            throw std::out_of_range("sequence " + std::to_string(sequence) + " of " + std::to_string(lengths.size));
        }
        const std::int64_t end = i + 1 == sequences.size ? stop : lengths[sequence];
        const std::int64_t first = pointers[sequence] / static_cast<std::int64_t>(sizeof(Token)) + offset;
        const std::int64_t count = end - offset;
        if (offset < 0 || count < 0 || end > lengths[sequence] || first < 0 || first + count > tokens.size ||
            filled + count > room) {
            throw std::out_of_range("tokens " + std::to_string(offset) + " to " + std::to_string(end) +
                                    " of sequence " + std::to_string(sequence));
        }
        if (count > 0) starts[(*num_starts)++] = static_cast<std::int32_t>(filled);
        for (std::int64_t t = 0; t < count; ++t) out[filled + t] = static_cast<std::int64_t>(tokens[first + t]);
        filled += count;
    }
    return filled;
}

template <typename Token>
py::tuple read_span_as(const py::array& tokens, const py::array& pointers, const py::array& lengths,
                       const py::array& sequences, std::int64_t offset, std::int64_t stop, std::int64_t size) {
    const View<Token> tokens_view(tokens, "tokens");
    const View<std::int64_t> pointers_view(pointers, "pointers");
    const Int32View lengths_view(lengths, "lengths");
    const Int32View sequences_view(sequences, "sequences");
    if (pointers_view.size != lengths_view.size || size < 0) {
        throw std::invalid_argument("pointers and lengths of " + std::to_string(pointers_view.size) + " and " +
                                    std::to_string(lengths_view.size) + " sequences, " + std::to_string(size) +
                                    " tokens");
    }
    py::array_t<std::int64_t> out(size);
    std::vector<std::int32_t> starts(static_cast<std::size_t>(std::min(sequences_view.size, size)));
    std::int64_t num_starts = 0;
    const std::int64_t filled = copy_span<Token>(tokens_view, pointers_view, lengths_view, sequences_view, offset, stop,
                                                 out.mutable_data(), size, starts.data(), &num_starts);
    std::fill(out.mutable_data() + filled, out.mutable_data() + size, 0);
    return py::make_tuple(out, filled, py::array_t<std::int32_t>(num_starts, starts.data()));
}

py::tuple read_span(const py::array& tokens, const py::array& pointers, const py::array& lengths,
                    const py::array& sequences, std::int64_t offset, std::int64_t stop, std::int64_t size) {
    const auto read = [&](auto token) {
        return read_span_as<decltype(token)>(tokens, pointers, lengths, sequences, offset, stop, size);
    };
    const char kind = tokens.dtype().kind();
    switch (tokens.dtype().itemsize()) {
        case 1: return kind == 'u' ? read(std::uint8_t{}) : read(std::int8_t{});
        case 2: return kind == 'u' ? read(std::uint16_t{}) : read(std::int16_t{});
        case 4: return read(std::int32_t{});
        default: return read(std::int64_t{});
    }
}

// Counts from 0 in each document, and numbers the documents.
py::tuple number_documents(const py::array& starts, std::int64_t size) {
    const Int32View starts_view(starts, "starts");
    if (size < 0 || (size > 0 && (starts_view.size == 0 || starts_view[0] != 0))) {
        throw std::invalid_argument("the first document does not start at 0");
    }
    py::array_t<std::int64_t> positions(size);
    py::array_t<std::int32_t> segments(size);
    std::int64_t* position = positions.mutable_data();
    std::int32_t* segment = segments.mutable_data();
    for (std::int64_t k = 0; k < starts_view.size; ++k) {
        const std::int64_t first = starts_view[k];
        const std::int64_t end = k + 1 < starts_view.size ? std::min<std::int64_t>(starts_view[k + 1], size) : size;
        if (first < 0 || (k + 1 < starts_view.size && starts_view[k + 1] <= first)) {
            throw std::invalid_argument("starts must ascend");
        }
        for (std::int64_t i = first; i < end; ++i) {
            position[i] = i - first;
            segment[i] = static_cast<std::int32_t>(k);
        }
    }
    return py::make_tuple(positions, segments);
}

// Which remaining rooms have a bin: a tree of 64-bit words, so that the smallest room from a given one on is found in a
// few steps whatever the capacity.
class RoomSet {
  public:
    explicit RoomSet(std::int64_t size) {
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(static_cast<std::size_t>(size), 0);
        } while (size > 1);
    }

    void insert(std::int64_t room) {
        for (auto& level : levels_) {
            level[room / 64] |= std::uint64_t{1} << (room % 64);
            room /= 64;
        }
    }

    void erase(std::int64_t room) {
        for (auto& level : levels_) {
            level[room / 64] &= ~(std::uint64_t{1} << (room % 64));
            if (level[room / 64] != 0) return;
            room /= 64;
        }
    }

    // The smallest member that is at least `room`, or -1.
    std::int64_t first_from(std::int64_t room) const {
        for (std::size_t k = 0; k < levels_.size(); ++k) {
            const std::size_t word = static_cast<std::size_t>(room / 64);
            if (word >= levels_[k].size()) return -1;
            const std::uint64_t found = levels_[k][word] >> (room % 64);
            if (found != 0) return descend(room + __builtin_ctzll(found), k);
            room = room / 64 + 1;
        }
        return -1;
    }

  private:
    std::int64_t descend(std::int64_t room, std::size_t k) const {
        while (k > 0) room = room * 64 + __builtin_ctzll(levels_[--k][room]);
        return room;
    }

    std::vector<std::vector<std::uint64_t>> levels_;  // bit i of a level: word i of the one before is not 0
};

// The items by falling length, of equal ones the first first.
std::vector<std::int32_t> by_falling_length(const Int32View& lengths, std::int64_t capacity) {
    std::vector<std::int64_t> place(static_cast<std::size_t>(capacity) + 1, 0);
    for (std::int64_t i = 0; i < lengths.size; ++i) ++place[capacity - lengths[i]];
    std::int64_t before = 0;
    for (std::int64_t& count : place) before += std::exchange(count, before);
    std::vector<std::int32_t> order(static_cast<std::size_t>(lengths.size));
    for (std::int64_t i = 0; i < lengths.size; ++i) order[place[capacity - lengths[i]]++] = static_cast<std::int32_t>(i);
    return order;
}

// Puts every item into the fullest bin that has room for it; of equally full ones into the one that came to be last.
std::int32_t assign_bins(const Int32View& lengths, std::int64_t capacity, const std::vector<std::int32_t>& order,
                         std::int32_t* bin_of) {
    RoomSet rooms(capacity + 1);
    std::vector<std::int32_t> newest(static_cast<std::size_t>(capacity) + 1, -1);  // by room; older ones behind it
    std::vector<std::int32_t> older;
    for (const std::int32_t item : order) {
        const std::int32_t length = lengths[item];
        std::int64_t room = rooms.first_from(length);
        std::int32_t bin;
        if (room < 0) {
            bin = static_cast<std::int32_t>(older.size());
            older.push_back(-1);
            room = capacity;
        } else {
            bin = newest[room];
            newest[room] = older[bin];
            if (newest[room] < 0) rooms.erase(room);
        }
        bin_of[item] = bin;
        room -= length;
        if (newest[room] < 0) rooms.insert(room);
        older[bin] = newest[room];
        newest[room] = bin;
    }
    return static_cast<std::int32_t>(older.size());
}

py::tuple build_packing_plan(const py::array& lengths, std::int64_t capacity) {
    const Int32View view(lengths, "lengths");
    if (capacity < 1 || capacity >= std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument("capacity = " + std::to_string(capacity) + " is not in [1, 2^31 - 1)");
    }
    if (view.size > std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument(std::to_string(view.size) + " lengths are more than an int32 can count");
    }
    py::array_t<std::int32_t> items(view.size);
    std::vector<std::int64_t> ends;
    {
        std::int32_t* out = items.mutable_data();
        py::gil_scoped_release release;
        require_range(view, 1, capacity + 1, "length");
        const std::vector<std::int32_t> order = by_falling_length(view, capacity);
        std::vector<std::int32_t> bin_of(static_cast<std::size_t>(view.size));
        const std::int32_t num_bins = assign_bins(view, capacity, order, bin_of.data());
        ends.assign(static_cast<std::size_t>(num_bins) + 1, 0);
        for (const std::int32_t bin : bin_of) ++ends[bin + 1];
        for (std::size_t bin = 1; bin < ends.size(); ++bin) ends[bin] += ends[bin - 1];
        std::vector<std::int64_t> next(ends.begin(), ends.end() - 1);
        for (const std::int32_t item : order) out[next[bin_of[item]]++] = item;
    }
    return py::make_tuple(items, py::array_t<std::int64_t>(static_cast<py::ssize_t>(ends.size()), ends.data()));
}

// Draw k of a stream of numbers in [0, 1): splitmix64 (Steele, Lea and Flood 2014), whose state is the stream's key.
class Draws {
  public:
    explicit Draws(std::uint64_t key) : state_(key) {}

    double next() { return static_cast<double>(mix(state_ += kStep) >> 11) * 0x1.0p-53; }
    std::int64_t below(std::int64_t bound) {
        return static_cast<std::int64_t>(next() * static_cast<double>(bound));
    }

    // The key of stream `number` among those of `key`.
    static std::uint64_t stream(std::uint64_t key, std::int64_t number) {
        return mix(key ^ mix(static_cast<std::uint64_t>(number) + kStep));
    }

  private:
    static constexpr std::uint64_t kStep = 0x9e3779b97f4a7c15;

    static std::uint64_t mix(std::uint64_t x) {
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
        return x ^ (x >> 31);
    }

    std::uint64_t state_;
};

// Cuts one document's sentences [start, end) into pairs of texts.
void add_pairs(const Int32View& lengths, std::int64_t start, std::int64_t end, std::int64_t max_tokens,
               double short_probability, Draws draws, std::vector<std::int32_t>* pairs) {
    while (end - start >= 2) {
        const bool is_short = draws.next() < short_probability;
        const std::int64_t target = is_short ? 2 + draws.below(max_tokens - 1) : max_tokens;
        std::int64_t num_tokens = 0, stop = start;
        // One sentence alone would be no pair, so the last is never left over.
        while (stop < end && (num_tokens < target || stop - start < 2 || end - stop == 1)) num_tokens += lengths[stop++];
        const std::int64_t middle = start + 1 + draws.below(stop - start - 1);
        const bool is_random = draws.next() < 0.5;
        for (const std::int64_t value : {start, middle, is_random ? middle : stop, target}) {
            pairs->push_back(static_cast<std::int32_t>(value));
        }
        start = is_random ? middle : stop;  // what a random text replaces is the next pair's
    }
}

py::array_t<std::int32_t> build_pair_index(const py::array& lengths, const py::array& documents, std::int64_t first,
                                           std::int64_t last, std::int64_t max_tokens, double short_probability,
                                           std::uint64_t key) {
    const Int32View lengths_view(lengths, "lengths");
    const View<std::int64_t> documents_view(documents, "documents");
    if (first < 0 || last < first || last >= documents_view.size || max_tokens < 2 ||
        lengths_view.size > std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument("documents " + std::to_string(first) + " to " + std::to_string(last) + " of " +
                                    std::to_string(documents_view.size - 1) + ", " +
                                    std::to_string(lengths_view.size) + " sentences, " + std::to_string(max_tokens) +
                                    " tokens");
    }
    std::vector<std::int32_t> pairs;
    {
        py::gil_scoped_release release;
        for (std::int64_t d = first; d < last; ++d) {
            const std::int64_t start = documents_view[d], end = documents_view[d + 1];
            if (start < 0 || end < start || end > lengths_view.size) {
                throw std::out_of_range("document " + std::to_string(d) + " is sequences " + std::to_string(start) +
                                        " to " + std::to_string(end) + " of " + std::to_string(lengths_view.size));
            }
            add_pairs(lengths_view, start, end, max_tokens, short_probability, Draws(Draws::stream(key, d)), &pairs);
        }
    }
    py::array_t<std::int32_t> result({static_cast<py::ssize_t>(pairs.size() / 4), static_cast<py::ssize_t>(4)});
    std::copy(pairs.begin(), pairs.end(), result.mutable_data());
    return result;
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
    module.def("build_blend_index", &build_blend_index, py::arg("weights"), py::arg("limits"), py::arg("num_samples"),
               R"(Return which dataset serves each sample, uint16 [n], and which of its samples that is, int64 [n].

Each time the dataset is served that is furthest behind its share, the first of equal ones, which is Megatron-LM's
rule. One that has served its limit is left out from then on, and the shares of the others are counted anew.
Releases the GIL. Raises ValueError where the limits do not allow num_samples.)");
    module.def("read_span", &read_span, py::arg("tokens"), py::arg("pointers"), py::arg("lengths"),
               py::arg("sequences"), py::arg("offset"), py::arg("stop"), py::arg("size"),
               R"(Return tokens int64 [size], how many are filled (the others are 0), and int32 [k] where sequences begin.

tokens: [t], any integer type. pointers: int64 [n], in bytes. lengths: int32 [n]. sequences: int32 [m], read from
`offset` of the first to before `stop` of the last. Raises IndexError where they do not lie in tokens or in size.)");
    module.def("number_documents", &number_documents, py::arg("starts"), py::arg("size"),
               R"(Return int64 [size], which counts from 0 in each document, and int32 [size], the documents' numbers.

starts: int32 [k], ascending from 0, where documents begin; those from `size` on are left out.)");
    module.def("build_packing_plan", &build_packing_plan, py::arg("lengths"), py::arg("capacity"),
               R"(Return the items of all bins end to end, int32 [n], and where bins begin and the last ends, int64 [bins + 1].

lengths: int32 [n], each in [1, capacity]. Best-fit decreasing: the longest first, each into the fullest bin that has
room, of equal ones into the latest. Releases the GIL. Raises IndexError for a length that fits no bin.)");
    module.def("build_pair_index", &build_pair_index, py::arg("lengths"), py::arg("documents"), py::kw_only(),
               py::arg("first"), py::arg("last"), py::arg("max_tokens"), py::arg("short_probability"), py::arg("key"),
               R"(Return the pairs of texts that documents `first` to before `last` are cut into, int32 [n, 4].

lengths: int32 [m], tokens per sentence. documents: int64 [d + 1], document i is sentences documents[i] to
documents[i + 1]. A row is (start, middle, stop, target): the first text is sentences start to middle, the second
middle to stop, and from elsewhere where these are equal, which happens with probability 0.5; together they are to have
at most `target` tokens: max_tokens, or with short_probability any number from 2 on. Releases the GIL. Raises ValueError
or IndexError on input that contradicts itself.)");
}
