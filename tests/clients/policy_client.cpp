// Runs an exported policy with LibTorch: policy_client policy.torchscript.pt WIDTH < observations
// Reads observations of WIDTH numbers each; writes the action, the value and the logits of each, one line a row.
#include <torch/script.h>

#include <iostream>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: policy_client policy.torchscript.pt WIDTH < observations\n";
    return 2;
  }
  const c10::InferenceMode inference;
  auto policy = torch::jit::load(argv[1]);
  const int64_t width = std::stoll(argv[2]);
  std::vector<float> numbers;
  for (float number; std::cin >> number;) numbers.push_back(number);
  const auto obs = torch::from_blob(numbers.data(), {static_cast<int64_t>(numbers.size()) / width, width});
  const auto out = policy.forward({obs}).toTuple()->elements();
  const auto logits = out[0].toTensor(), value = out[1].toTensor(), action = out[2].toTensor();
  std::cout.precision(9);
  for (int64_t row = 0; row < obs.size(0); ++row) {
    std::cout << action[row].item<int64_t>() << ' ' << value[row].item<float>();
    for (int64_t a = 0; a < logits.size(1); ++a) std::cout << ' ' << logits[row][a].item<float>();
    std::cout << '\n';
  }
}
