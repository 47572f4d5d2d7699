// The choice of experts (DeepSeek-V3 section 2.1.2), one token at a time.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "layers/backend.h"

namespace farthing {
namespace {

constexpr float kExcluded = -std::numeric_limits<float>::infinity();

void activate(const Router& r, float* s) {
  for (size_t e = 0; e < r.logit_bias.size(); ++e) s[e] += r.logit_bias[e];
  if (r.scoring == Router::Scoring::sigmoid) {
    for (int e = 0; e < r.experts; ++e) s[e] = 1.0f / (1.0f + std::exp(-s[e]));
    return;
  }
  if (r.scoring == Router::Scoring::sqrt_softplus) {
    for (int e = 0; e < r.experts; ++e)
      s[e] = std::sqrt(std::max(s[e], 0.0f) + std::log1p(std::exp(-std::fabs(s[e]))));
    return;
  }
  const float top = *std::max_element(s, s + r.experts);
  float sum = 0.0f;
  for (int e = 0; e < r.experts; ++e) sum += s[e] = std::exp(s[e] - top);
  for (int e = 0; e < r.experts; ++e) s[e] /= sum;
}

int argmax(const float* x, int n) { return static_cast<int>(std::max_element(x, x + n) - x); }

// The k largest of x, of equal ones the first. One pass: few of many numbers enter the list.
void find_largest(const float* x, int n, int k, int32_t* ids) {
  float best[kMostExperts];
  std::fill_n(best, k, kExcluded);
  std::fill_n(ids, k, 0);
  for (int i = 0; i < n; ++i) {
    if (!(x[i] > best[k - 1])) continue;
    int at = k - 1;
    for (; at > 0 && x[i] > best[at - 1]; --at) best[at] = best[at - 1], ids[at] = ids[at - 1];
    best[at] = x[i], ids[at] = i;
  }
}

float group_score(const Router& r, const float* x, int n) {
  const int best = argmax(x, n);
  if (!r.top2_sum) return x[best];
  float second = kExcluded;
  for (int i = 0; i < n; ++i)
    if (i != best) second = std::max(second, x[i]);
  return x[best] + second;
}

void exclude_groups(const Router& r, float* choice) {
  const int n = r.experts / r.groups;
  float score[kMostExperts];
  for (int g = 0; g < r.groups; ++g) score[g] = group_score(r, choice + g * n, n);
  bool kept[kMostExperts] = {};
  for (int i = 0; i < r.top_k_groups; ++i) {
    const int g = argmax(score, r.groups);
    kept[g] = true;
    score[g] = kExcluded;
  }
  for (int g = 0; g < r.groups; ++g)
    if (!kept[g]) std::fill_n(choice + g * n, n, kExcluded);
}

// The fewest experts (at least min_experts) whose share of the weights reaches the mass.
void keep_mass(const Router& r, int32_t* ids, float* weights) {
  float sum = 0.0f, before = 0.0f;
  for (int i = 1; i < r.top_k; ++i)  // insertion sort, stable, heaviest first
    for (int j = i; j > 0 && weights[j] > weights[j - 1]; --j)
      std::swap(weights[j], weights[j - 1]), std::swap(ids[j], ids[j - 1]);
  for (int i = 0; i < r.top_k; ++i) sum += weights[i];
  for (int i = 0; i < r.top_k; ++i) {
    const float share = weights[i] / sum;
    if (before >= r.mass && i >= r.min_experts) ids[i] = -1, weights[i] = 0.0f;
    before += share;
  }
}

void normalize(const Router& r, const int32_t* ids, float* weights) {
  float sum = 0.0f;
  for (int i = 0; i < r.top_k; ++i) sum += weights[i];
  for (int i = 0; i < r.top_k; ++i)
    weights[i] = (r.normalize ? weights[i] / (sum + 1e-20f) : weights[i]) * r.scale;
  for (int i = 0; i < r.top_k && !r.expert_scale.empty(); ++i)
    if (ids[i] >= 0) weights[i] *= r.expert_scale[ids[i]];
}

void require(bool ok, const char* name, int value, const std::string& expected) {
  if (!ok)
    throw std::invalid_argument(std::string(name) + " " + std::to_string(value) + " of a router; expected " +
                                expected);
}

}  // namespace

void Router::check() const {
  require(experts >= 1 && experts <= kMostExperts, "num_experts", experts,
          "1 to " + std::to_string(kMostExperts));
  require(top_k >= 1 && top_k <= experts, "top_k", top_k, "1 to num_experts = " + std::to_string(experts));
  require(groups >= 1 && experts % groups == 0, "num_groups", groups,
          "a divisor of num_experts = " + std::to_string(experts));
  require(top_k_groups >= 1 && top_k_groups <= groups, "top_k_groups", top_k_groups,
          "1 to num_groups = " + std::to_string(groups));
  require(identities >= 0 && identities < experts, "identities", identities,
          "less than num_experts = " + std::to_string(experts));
  const int biases = static_cast<int>(bias.size());
  const int logits = static_cast<int>(logit_bias.size());
  const int scales = static_cast<int>(expert_scale.size());
  for (const int count : {biases, logits, scales})
    require(count == 0 || count == experts, "biases", count, "num_experts = " + std::to_string(experts));
}

void choose_experts(const Router& r, float* scores, int32_t* ids, float* weights) {
  float choice[kMostExperts];
  activate(r, scores);
  for (int e = 0; e < r.experts; ++e) choice[e] = scores[e] + (r.bias.empty() ? 0.0f : r.bias[e]);
  if (r.groups > 1) exclude_groups(r, choice);
  find_largest(choice, r.experts, r.top_k, ids);
  for (int i = 0; i < r.top_k; ++i) weights[i] = scores[ids[i]];
  if (r.mass >= 0.0f) keep_mass(r, ids, weights);
  normalize(r, ids, weights);
}

void weigh_experts(const Router& r, float* scores, const int64_t* chosen, int32_t* ids, float* weights) {
  activate(r, scores);
  for (int i = 0; i < r.top_k; ++i) {
    ids[i] = static_cast<int32_t>(std::clamp<int64_t>(chosen[i], 0, r.experts - 1));
    weights[i] = scores[ids[i]];
  }
  normalize(r, ids, weights);
}

}  // namespace farthing
