// The blend index. The Python oracle: tests/data/test_blend_index.py.
//
// Whom a step serves depends on all steps before it, but how many samples each dataset has served after n steps is known
// without them to within very few: n, apportioned by largest remainder. And two runs from nearly the same counts soon
// have the same ones: where they serve different datasets, each serves one that the other is ahead with, or as far
// behind, so that the squared difference of their counts never grows, and differences that meet cancel. So a long blend
// is run from many places at once, from guessed counts: many on each thread, side by side in vectors. Then the true
// counts are followed from each place to where they meet those of the guess, most often at once. A guess that is far
// off costs time and never changes the result.

#include "blend_index.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <numeric>
#include <system_error>
#include <thread>

namespace {

constexpr std::size_t kLanes = 32;       // runs side by side on a thread
constexpr std::size_t kMostVectors = 4;  // of them in registers at once
constexpr std::int64_t kMostThreads = 16;
constexpr std::int64_t kShortestRun = 1024;

// The datasets that take part until the next one reaches its limit. A member is a position in these vectors.
struct Members {
    std::vector<std::uint16_t> datasets;   // ascending
    std::vector<double> shares;            // they add up to 1
    std::vector<std::int64_t> served;      // samples served before
    std::vector<std::int64_t> room;        // samples until the limit
    std::vector<std::uint16_t> member_of;  // by dataset

    std::size_t size() const { return datasets.size(); }
};

// Where it is written who serves each step.
struct Output {
    std::uint16_t* dataset;
    std::int64_t* sample;

    void write(const Members& members, std::int64_t step, std::size_t member, std::int64_t count) const {
        dataset[step] = members.datasets[member];
        sample[step] = members.served[member] + count;
    }
};

using Counts = std::vector<std::int64_t>;

std::size_t furthest_behind(const Members& members, const Counts& counts, std::int64_t step) {
    const double steps = static_cast<double>(std::max<std::int64_t>(step, 1));
    std::size_t chosen = 0;
    double largest = -std::numeric_limits<double>::infinity();
    for (std::size_t member = 0; member < members.size(); ++member) {
        const double deficit = members.shares[member] * steps - static_cast<double>(counts[member]);
        chosen = deficit > largest ? member : chosen;
        largest = deficit > largest ? deficit : largest;
    }
    return chosen;
}

// `steps` apportioned by largest remainder.
Counts guessed_counts(const Members& members, std::int64_t steps) {
    Counts counts(members.size());
    std::vector<double> remainders(members.size());
    for (std::size_t member = 0; member < members.size(); ++member) {
        const double due = members.shares[member] * static_cast<double>(steps);
        counts[member] = static_cast<std::int64_t>(due);
        remainders[member] = due - std::floor(due);
    }
    std::vector<std::size_t> order(members.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return remainders[a] > remainders[b]; });
    const std::int64_t left = steps - std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
    for (std::int64_t i = 0; i < left; ++i) ++counts[order[static_cast<std::size_t>(i) % order.size()]];
    return counts;
}

// Runs side by side: lane k makes `length` steps from step first + k * length.
struct Runs {
    std::vector<double> counts;  // [members, lanes]
    std::vector<double> steps;   // [lanes]
    std::int64_t first, length;

    Runs(const Members& members, std::int64_t first_step, std::int64_t run_length)
        : counts(members.size() * kLanes), steps(kLanes), first(first_step), length(run_length) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            const Counts guess = guessed_counts(members, start_of(lane));
            for (std::size_t m = 0; m < members.size(); ++m) counts[m * kLanes + lane] = static_cast<double>(guess[m]);
            steps[lane] = static_cast<double>(start_of(lane));
        }
    }

    std::int64_t start_of(std::size_t lane) const { return first + static_cast<std::int64_t>(lane) * length; }

    Counts counts_of(std::size_t lane, std::size_t num_members) const {
        Counts result(num_members);
        for (std::size_t m = 0; m < num_members; ++m) result[m] = static_cast<std::int64_t>(counts[m * kLanes + lane]);
        return result;
    }
};

typedef double TwoLanes __attribute__((vector_size(16)));
typedef double FourLanes __attribute__((vector_size(32)));
typedef double EightLanes __attribute__((vector_size(64)));

// Makes the steps of `runs` with vectors that the processor must have: others would be taken apart, slowly.
template <typename Vector>
[[gnu::always_inline]] inline void run_with(Runs& runs, const Members& members, const Output& out) {
    constexpr std::size_t kWidth = sizeof(Vector) / sizeof(double);
    constexpr std::size_t kTogether = std::min(kMostVectors, kLanes / kWidth);
    const double* shares = members.shares.data();
    double* counts = runs.counts.data();
    for (std::int64_t done = 0; done < runs.length; ++done) {
        for (std::size_t first = 0; first < kLanes; first += kTogether * kWidth) {
            Vector number = {}, steps[kTogether], largest[kTogether], chosen[kTogether];
            for (std::size_t v = 0; v < kTogether; ++v) {
                std::memcpy(&steps[v], &runs.steps[first + v * kWidth], sizeof(Vector));
                largest[v] = number - std::numeric_limits<double>::infinity();
                chosen[v] = number;
            }
            for (std::size_t member = 0; member < members.size(); ++member, number += 1.0) {
                for (std::size_t v = 0; v < kTogether; ++v) {
                    Vector served;
                    std::memcpy(&served, counts + member * kLanes + first + v * kWidth, sizeof served);
                    const Vector deficits = shares[member] * steps[v] - served;
                    chosen[v] = deficits > largest[v] ? number : chosen[v];
                    largest[v] = deficits > largest[v] ? deficits : largest[v];
                }
            }
            for (std::size_t i = 0; i < kTogether * kWidth; ++i) {
                const std::size_t lane = first + i, member = static_cast<std::size_t>(chosen[i / kWidth][i % kWidth]);
                double& count = counts[member * kLanes + lane];
                out.write(members, runs.start_of(lane) + done, member, static_cast<std::int64_t>(count));
                count += 1.0;
                runs.steps[lane] += 1.0;
            }
        }
    }
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f"))) void run_with_avx512(Runs& runs, const Members& members, const Output& out) {
    run_with<EightLanes>(runs, members, out);
}

__attribute__((target("avx2"))) void run_with_avx2(Runs& runs, const Members& members, const Output& out) {
    run_with<FourLanes>(runs, members, out);
}

void run(Runs& runs, const Members& members, const Output& out) {
    if (__builtin_cpu_supports("avx512f")) return run_with_avx512(runs, members, out);
    if (__builtin_cpu_supports("avx2")) return run_with_avx2(runs, members, out);
    run_with<TwoLanes>(runs, members, out);
}
#else
void run(Runs& runs, const Members& members, const Output& out) { run_with<TwoLanes>(runs, members, out); }
#endif

// Replaces what was run from guessed counts by what is run from the true ones, until both are the same. Returns whether
// they were before `stop`; `counts` are the true ones at that step.
bool follow(const Members& members, std::int64_t start, std::int64_t stop, Counts& counts, const Output& out) {
    Counts guess = guessed_counts(members, start);
    std::size_t num_different = 0;
    for (std::size_t member = 0; member < members.size(); ++member) num_different += guess[member] != counts[member];
    const auto serve = [&](Counts& own, const Counts& other, std::size_t member) {
        num_different -= own[member] != other[member];
        ++own[member];
        num_different += own[member] != other[member];
    };
    for (std::int64_t step = start; step < stop && num_different > 0; ++step) {
        const std::size_t guessed = members.member_of[out.dataset[step]];
        const std::size_t chosen = furthest_behind(members, counts, step);
        out.write(members, step, chosen, counts[chosen]);
        serve(guess, counts, guessed);
        serve(counts, guess, chosen);
    }
    return num_different == 0;
}

// Makes kLanes * `length` steps on each thread from step `first` on, which reach no limit. Returns where they end.
std::int64_t run_side_by_side(const Members& members, std::int64_t first, std::int64_t length, std::int64_t num_threads,
                              Counts& counts, const Output& out) {
    std::vector<Runs> all;
    std::int64_t end = first;
    for (std::int64_t i = 0; i < num_threads; ++i, end += static_cast<std::int64_t>(kLanes) * length) {
        all.emplace_back(members, end, length);
    }
    std::vector<std::thread> threads;
    for (Runs& runs : all) {
        try {
            threads.emplace_back([&] { run(runs, members, out); });
        } catch (const std::system_error&) {  // the system gives no more threads
            run(runs, members, out);
        }
    }
    for (std::thread& thread : threads) thread.join();
    for (const Runs& runs : all) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            const std::int64_t start = runs.start_of(lane);
            if (follow(members, start, start + length, counts, out)) counts = runs.counts_of(lane, members.size());
        }
    }
    return end;
}

// A dataset that is served is not ahead of its share, so these steps leave every dataset samples.
std::int64_t steps_within_limits(const Members& members, std::int64_t num_steps) {
    double steps = static_cast<double>(num_steps);
    for (std::size_t member = 0; member < members.size(); ++member) {
        steps = std::min(steps, (static_cast<double>(members.room[member]) - 2.0) / members.shares[member]);
    }
    return static_cast<std::int64_t>(std::max(steps, 0.0));
}

// Serves up to `num_steps` samples, but none after one that is the last of its dataset. Returns how many of each.
Counts serve(const Members& members, std::int64_t num_steps, const Output& out) {
    Counts counts(members.size(), 0);
    std::int64_t step = 0;
    const auto serve_next = [&] {
        const std::size_t chosen = furthest_behind(members, counts, step);
        out.write(members, step++, chosen, counts[chosen]);
        return ++counts[chosen] == members.room[chosen];
    };
    const std::int64_t free = steps_within_limits(members, num_steps);
    constexpr std::int64_t kRuns = kLanes;
    if (free > kShortestRun * kRuns) {
        serve_next();  // the one step that is unlike others: deficits before it are those after it
        const std::int64_t num_cores = std::clamp<std::int64_t>(std::thread::hardware_concurrency(), 1, kMostThreads);
        const std::int64_t num_threads = std::min(num_cores, free / (kShortestRun * kRuns));
        const std::int64_t length = (free - step) / (num_threads * kRuns);
        step = run_side_by_side(members, step, length, num_threads, counts, out);
    }
    for (bool is_last = false; step < num_steps && !is_last;) is_last = serve_next();
    return counts;
}

Members members_left(const std::vector<double>& weights, const std::vector<std::int64_t>& limits,
                     const std::vector<std::int64_t>& served) {
    Members members;
    members.member_of.resize(weights.size());
    double total = 0.0;
    for (std::size_t d = 0; d < weights.size(); ++d) total += served[d] < limits[d] ? weights[d] : 0.0;
    for (std::size_t d = 0; d < weights.size(); ++d) {
        if (served[d] >= limits[d] || weights[d] == 0.0) continue;
        members.member_of[d] = static_cast<std::uint16_t>(members.size());
        members.datasets.push_back(static_cast<std::uint16_t>(d));
        members.shares.push_back(weights[d] / total);
        members.served.push_back(served[d]);
        members.room.push_back(limits[d] - served[d]);
    }
    return members;
}

}  // namespace

void fill_blend_index(const std::vector<double>& weights, const std::vector<std::int64_t>& limits,
                      std::int64_t num_samples, std::uint16_t* dataset, std::int64_t* sample) {
    std::vector<std::int64_t> served(weights.size(), 0);
    for (std::int64_t done = 0; done < num_samples;) {  // once more for each dataset that reaches its limit
        const Members members = members_left(weights, limits, served);
        const Counts counts = serve(members, num_samples - done, {dataset + done, sample + done});
        for (std::size_t member = 0; member < members.size(); ++member) {
            served[members.datasets[member]] += counts[member];
            done += counts[member];
        }
    }
}
