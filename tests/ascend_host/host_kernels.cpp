// The host side of MindSpore's internal Ascend kernels, driven by calls that come in on standard input.
//
// A line is one call:  KERNEL key=value ... < ARGUMENT ... > ARGUMENT ...
// with an argument as float16[2,1,4096], int32[] or none, inputs after "<" and outputs after ">". Keys are the members
// of the kernel's parameter struct (op_param.h). The answer is a line "= ok", "= ok on asdops" where the library hands
// the call on to its asdops kernels, or "= " and the first step that refused it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "include/internal.h"

using namespace mindspore::internal;

namespace {

struct Call {
  std::string kernel;
  std::map<std::string, std::string> keys;
  InputsImmutableInfoList inputs;
  OutputsImmutableInfoList outputs;
  ShapeInfoList input_shapes;
  ShapeInfoList output_shapes;

  template <typename T = int64_t>
  std::vector<T> list(const std::string &key) const {
    std::vector<T> numbers;
    std::stringstream text(keys.count(key) ? keys.at(key) : "");
    for (std::string part; std::getline(text, part, ',');) numbers.push_back(static_cast<T>(std::stoll(part)));
    return numbers;
  }
  int64_t number(const std::string &key) const { return std::stoll(keys.at(key)); }
  float real(const std::string &key) const { return std::stof(keys.at(key)); }
};

const std::map<std::string, DataType> kDtypes = {
    {"float16", kTypeFloat16}, {"bfloat16", kTypeBF16}, {"float32", kTypeFloat32}, {"int32", kTypeInt32},
    {"int64", kTypeInt64},     {"bool", kTypeBool},     {"none", kTypeNone}};

Call parse(const std::string &line) {
  Call call;
  std::stringstream words(line);
  words >> call.kernel;
  InputsImmutableInfoList *infos = nullptr;
  ShapeInfoList *shapes = nullptr;
  for (std::string word; words >> word;) {
    if (word == "<") {
      infos = &call.inputs, shapes = &call.input_shapes;
    } else if (word == ">") {
      infos = &call.outputs, shapes = &call.output_shapes;
    } else if (infos == nullptr) {
      const auto split = word.find('=');
      call.keys[word.substr(0, split)] = word.substr(split + 1);
    } else {
      const auto bracket = word.find('[');
      infos->emplace_back(kDtypes.at(word.substr(0, bracket)), kFormatND);
      ShapeInfo shape;
      if (bracket != std::string::npos) {
        std::stringstream axes(word.substr(bracket + 1, word.size() - bracket - 2));
        for (std::string axis; std::getline(axes, axis, ',');) shape.push_back(std::stoll(axis));
      }
      shapes->push_back(shape);
    }
  }
  return call;
}

InternalOpPtr create(const Call &call) {
  const auto &in = call.inputs;
  const auto &out = call.outputs;
  const auto &name = call.kernel;
  if (name == "PagedAttention") {
    PagedAttentionParam param;
    param.head_num = call.number("head_num");
    param.kv_head_num = call.number("kv_head_num");
    param.tor = call.real("tor");
    param.mask_mode = static_cast<PagedAttentionParam::MaskMode>(call.number("mask_mode"));
    param.mask_type = static_cast<PagedAttentionParam::MaskType>(call.number("mask_type"));
    param.q_seq_len = call.list<int32_t>("q_seq_len");
    param.kv_seq_len = call.list<int32_t>("kv_seq_len");
    param.has_q_seq_lens = call.number("has_q_seq_lens");
    return CreatePagedAttentionOp(in, out, param, name);
  }
  if (name == "FlashAttentionScore") {
    FlashAttentionScoreParam param;
    param.head_num = call.number("head_num");
    param.tor = call.real("tor");
    param.pre_tokens = call.number("pre_tokens");
    param.next_tokens = call.number("next_tokens");
    param.inner_precise = call.number("inner_precise");
    param.input_layout = call.number("input_layout");
    param.sparse_mode = call.number("sparse_mode");
    param.mask_dtype = in.back().GetDtype();
    param.mask_dims = call.input_shapes.back();
    param.q_seq_len = call.list<int32_t>("q_seq_len");
    param.kv_seq_len = call.list<int32_t>("kv_seq_len");
    return CreateFlashAttentionScoreOp(in, out, param, name);
  }
  if (name == "ApplyRotaryPosEmb") {
    ApplyRotaryPosEmbParam param;
    param.cos_format = call.number("cos_format");
    return CreateApplyRotaryPosEmbOp(in, out, param, name);
  }
  if (name == "MatMul") {
    MatmulParam param;
    param.transpose_a = call.number("transpose_a");
    param.transpose_b = call.number("transpose_b");
    return CreateMatmulOp(in, out, param, name);
  }
  if (name == "MultiWeightMatmul") {
    const auto widths = call.list("widths");
    MultiWeightMatmulParam param{};
    param.n0_len = widths.at(0);
    param.n1_len = widths.at(1);
    param.n2_len = widths.size() > 2 ? widths[2] : 0;
    param.transpose_a = false;
    param.transpose_b = true;
    param.silu_position = -1;
    param.fused = true;
    return CreateMultiWeightMatmulOp(in, out, param, name);
  }
  if (name == "RmsNorm" || name == "AddRmsNorm") {
    NormParam param{};
    param.eps = call.real("eps");
    return name == "RmsNorm" ? CreateRmsNormOp(in, out, param, name) : CreateAddRmsNormOp(in, out, param, name);
  }
  if (name == "Split") {
    SplitParam param;
    param.split_dim = call.number("split_dim");
    param.split_sizes = call.list<uint32_t>("split_sizes");
    return CreateSplitOp(in, out, param, name);
  }
  if (name == "SwiGLU") {
    SwiGLUParam param;
    param.axis = call.number("axis");
    return CreateSwiGLUOp(in, out, param, name);
  }
  if (name == "ReduceSum") {
    ReduceSumParam param;
    param.axes = call.list("axes");
    return CreateReduceSumOp(in, out, param, name);
  }
  if (name == "Gather") {
    GatherParam param;
    param.axes = call.list("axes");
    param.batch_dims = call.number("batch_dims");
    return CreateGatherOp(in, out, param, name);
  }
  if (name == "Transpose") {
    TransposeParam param;
    param.axes = call.list("axes");
    return CreateTransposeOp(in, out, param, name);
  }
  if (name == "ReshapeAndCache") return CreateReshapeAndCacheOp(in, out, name);
  if (name == "Swish") return CreateSwishOp(in, out, name);
  if (name == "Cast") return CreateCastOp(in, out, name);
  if (name == "Add") return CreateAddOp(in, out, name);
  if (name == "Sub") return CreateSubOp(in, out, name);
  if (name == "Mul") return CreateMulOp(in, out, name);
  if (name == "RealDiv") return CreateRealDivOp(in, out, name);
  if (name == "Less") return CreateLessOp(in, out, name);
  return nullptr;
}

InputDataTypes dtypes(const std::vector<ArgImmutableInfo> &infos) {
  InputDataTypes types;
  for (const auto &info : infos) types.push_back(info.GetDtype());
  return types;
}

std::string outcome(const Call &call) {
  // What MindSpore asks before it chooses an internal kernel; where the answer is no, another backend must have one.
  if (!IsInternalKernelDtypesSupported(call.kernel, dtypes(call.inputs), dtypes(call.outputs))) return "dtypes";
  const auto op = create(call);
  if (op == nullptr) return "unknown";
  if (op->Init() != kInternalOk) return "Init";
  if (op->UpdateShape(call.input_shapes, call.output_shapes) != kInternalOk) return "UpdateShape";
  std::vector<char> tiling(op->GetTilingSize() + 4096);
  HostRunInfoPtr info;
  if (op->Tiling(tiling.data(), &info) != kInternalOk) return "Tiling";
  return op->GetOpName().rfind("Internal", 0) == 0 ? "ok" : "ok on asdops";
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    const std::string answer = outcome(parse(line));  // the kernels log to standard output meanwhile
    std::cout << "\n= " << answer << std::endl;
  }
}
