// oneDNN's bare primitives behind a C interface, which onednn.py compiles and loads: as the best
// peer would use them. Weights are in the format the primitive itself chooses, reordered before any
// timing; activations are NHWC or NCHW; memory and scratchpad are there before the first run.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <unordered_map>

#include "dnnl.hpp"

namespace {

using dnnl::memory;
using Dims = memory::dims;

// The fields of `problem`, as onednn.py writes them.
enum Field {
  kN,
  kC,
  kH,
  kW,
  kK,
  kR,
  kS,
  kOh,
  kOw,
  kStrideH,
  kStrideW,
  kTop,
  kBottom,
  kLeft,
  kRight,
  kDilationH,
  kDilationW,
  kGroups,
  kDirection,
  kIsPool,
  kIsNchw
};
enum Direction { kFprop, kDgrad, kWgrad };

struct Case {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::primitive primitive;
  std::unordered_map<int, memory> arguments;
  memory result;
  memory::desc result_format;  // what the caller reads
  std::string algorithm;
  std::int64_t workspace = 0;

  // The caller's data, in the primitive's format.
  memory load(const memory::desc& from, const memory::desc& to, const float* data) {
    memory given(from, engine, const_cast<float*>(data));
    memory own(to, engine);
    dnnl::reorder(given, own).execute(stream, given, own);
    stream.wait();
    return own;
  }

  template <class PrimitiveDesc>
  void finish(const PrimitiveDesc& description, const dnnl::primitive& made) {
    primitive = made;
    algorithm = description.impl_info_str();
    workspace = static_cast<std::int64_t>(description.scratchpad_desc().get_size());
    arguments[DNNL_ARG_SCRATCHPAD] = memory(description.scratchpad_desc(), engine);
  }
};

memory::desc floats(const Dims& dims, memory::format_tag tag) {
  return {dims, memory::data_type::f32, tag};
}

Case* make_conv(Case* c, const std::int64_t* p, const float* x, const float* w, const float* dy) {
  const auto tag = p[kIsNchw] ? memory::format_tag::nchw : memory::format_tag::nhwc;
  const auto any = memory::format_tag::any;
  const std::int64_t g = p[kGroups], cg = p[kC] / g, kg = p[kK] / g, k = p[kK];
  const auto x_md = floats({p[kN], p[kC], p[kH], p[kW]}, tag);
  const auto y_md = floats({p[kN], p[kK], p[kOh], p[kOw]}, tag);
  // The caller's are HWIO; those of a group are neighbours in O.
  const Dims w_dims = g == 1 ? Dims{kg, cg, p[kR], p[kS]} : Dims{g, kg, cg, p[kR], p[kS]};
  const Dims w_strides =
      g == 1 ? Dims{1, k, p[kS] * cg * k, cg * k} : Dims{kg, 1, k, p[kS] * cg * k, cg * k};
  const memory::desc hwio(w_dims, memory::data_type::f32, w_strides);
  const auto w_any = floats(w_dims, any);
  const Dims strides{p[kStrideH], p[kStrideW]}, dilations{p[kDilationH] - 1, p[kDilationW] - 1};
  const Dims before{p[kTop], p[kLeft]}, after{p[kBottom], p[kRight]};
  const auto direct = dnnl::algorithm::convolution_direct;
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);

  const bool training = p[kDirection] != kFprop;
  const dnnl::convolution_forward::primitive_desc forward(
      c->engine, training ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference,
      direct, x_md, w_any, y_md, strides, dilations, before, after, attributes);
  if (p[kDirection] == kFprop) {
    c->arguments[DNNL_ARG_SRC] = c->load(x_md, x_md, x);
    c->arguments[DNNL_ARG_WEIGHTS] = c->load(hwio, forward.weights_desc(), w);
    c->arguments[DNNL_ARG_DST] = c->result = memory(y_md, c->engine);
    c->result_format = y_md;
    c->finish(forward, dnnl::convolution_forward(forward));
  } else if (p[kDirection] == kDgrad) {
    const dnnl::convolution_backward_data::primitive_desc backward(c->engine, direct, x_md, w_any,
                                                                   y_md, strides, dilations, before,
                                                                   after, forward, attributes);
    c->arguments[DNNL_ARG_DIFF_DST] = c->load(y_md, y_md, dy);
    c->arguments[DNNL_ARG_WEIGHTS] = c->load(hwio, backward.weights_desc(), w);
    c->arguments[DNNL_ARG_DIFF_SRC] = c->result = memory(x_md, c->engine);
    c->result_format = x_md;
    c->finish(backward, dnnl::convolution_backward_data(backward));
  } else {
    const dnnl::convolution_backward_weights::primitive_desc backward(
        c->engine, direct, x_md, w_any, y_md, strides, dilations, before, after, forward,
        attributes);
    c->arguments[DNNL_ARG_SRC] = c->load(x_md, x_md, x);
    c->arguments[DNNL_ARG_DIFF_DST] = c->load(y_md, y_md, dy);
    c->arguments[DNNL_ARG_DIFF_WEIGHTS] = c->result =
        memory(backward.diff_weights_desc(), c->engine);
    c->result_format = hwio;
    c->finish(backward, dnnl::convolution_backward_weights(backward));
  }
  return c;
}

Case* make_pool(Case* c, const std::int64_t* p, const float* x, const float* dy) {
  const auto tag = p[kIsNchw] ? memory::format_tag::nchw : memory::format_tag::nhwc;
  const auto x_md = floats({p[kN], p[kC], p[kH], p[kW]}, tag);
  const auto y_md = floats({p[kN], p[kC], p[kOh], p[kOw]}, tag);
  const Dims strides{p[kStrideH], p[kStrideW]}, window{p[kR], p[kS]}, dilations{0, 0};
  const Dims before{p[kTop], p[kLeft]}, after{p[kBottom], p[kRight]};
  const auto max = dnnl::algorithm::pooling_max;
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);

  const bool training = p[kDirection] != kFprop;
  const dnnl::pooling_forward::primitive_desc forward(
      c->engine, training ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference,
      max, x_md, y_md, strides, window, dilations, before, after, attributes);
  c->arguments[DNNL_ARG_SRC] = c->load(x_md, x_md, x);
  c->arguments[DNNL_ARG_DST] = c->result = memory(y_md, c->engine);
  c->result_format = y_md;
  if (training) c->arguments[DNNL_ARG_WORKSPACE] = memory(forward.workspace_desc(), c->engine);
  c->finish(forward, dnnl::pooling_forward(forward));
  if (!training) return c;

  c->primitive.execute(c->stream, c->arguments);
  c->stream.wait();
  const dnnl::pooling_backward::primitive_desc backward(
      c->engine, max, x_md, y_md, strides, window, dilations, before, after, forward, attributes);
  const memory argmax = c->arguments[DNNL_ARG_WORKSPACE];
  c->arguments.clear();
  c->arguments[DNNL_ARG_DIFF_DST] = c->load(y_md, y_md, dy);
  c->arguments[DNNL_ARG_WORKSPACE] = argmax;
  c->arguments[DNNL_ARG_DIFF_SRC] = c->result = memory(x_md, c->engine);
  c->result_format = x_md;
  c->finish(backward, dnnl::pooling_backward(backward));
  return c;
}

}  // namespace

extern "C" {

// A case, or null and why in `message`.
void* fastconv_onednn_create(const std::int64_t* problem, const float* x, const float* w,
                             const float* dy, char* message, int length) {
  Case* c = nullptr;
  try {
    c = new Case;
    return problem[kIsPool] ? make_pool(c, problem, x, dy) : make_conv(c, problem, x, w, dy);
  } catch (const std::exception& error) {
    std::snprintf(message, static_cast<std::size_t>(length), "%s", error.what());
  }
  delete c;
  return nullptr;
}

// Runs it `calls` times; nanoseconds of each. 0, or 1 where oneDNN failed.
int fastconv_onednn_run(void* handle, int calls, std::int64_t* nanoseconds) {
  using Clock = std::chrono::steady_clock;
  Case& c = *static_cast<Case*>(handle);
  try {
    for (int i = 0; i < calls; ++i) {
      const Clock::time_point start = Clock::now();
      c.primitive.execute(c.stream, c.arguments);
      c.stream.wait();
      nanoseconds[i] =
          std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
    }
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

// The result, in the layout of the activations or as HWIO.
int fastconv_onednn_result(void* handle, float* out) {
  Case& c = *static_cast<Case*>(handle);
  try {
    memory plain(c.result_format, c.engine, out);
    dnnl::reorder(c.result, plain).execute(c.stream, c.result, plain);
    c.stream.wait();
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

const char* fastconv_onednn_algorithm(void* handle) {
  return static_cast<Case*>(handle)->algorithm.c_str();
}

std::int64_t fastconv_onednn_workspace(void* handle) {
  return static_cast<Case*>(handle)->workspace;
}

void fastconv_onednn_destroy(void* handle) { delete static_cast<Case*>(handle); }

void fastconv_onednn_version(char* text, int length) {
  const dnnl_version_t* v = dnnl_version();
  std::snprintf(text, static_cast<std::size_t>(length), "%d.%d.%d", v->major, v->minor, v->patch);
}

int fastconv_onednn_isa(void) { return static_cast<int>(dnnl::get_effective_cpu_isa()); }

}  // extern "C"
