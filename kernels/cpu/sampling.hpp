// Choosing the next token from logits.
#pragma once

namespace wb {

struct Sampler {
  double temperature = 0;  // 0: the largest logit, the lowest id on ties
  int top_k = 0;           // 0: all
  double top_p = 1;
};

// `uniform` in [0, 1) decides where the temperature is not 0. Returns -1 where a logit is NaN.
int sample(const float* logits, int n, const Sampler& sampler, double uniform);

}  // namespace wb
