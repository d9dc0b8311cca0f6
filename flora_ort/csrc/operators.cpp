// What ONNX Runtime hands over, checked and made a call.
//
//     LoraAdd(p, B, bias?, z?, ids?)                          -> y          parts
//     LoraSwiGLU(p, B, bias?, z?, ids?)                       -> y          gate, up, width, activation
//     LoraSkipRMSNorm(p, B, gamma, skip?, bias?, z?, ids?)    -> y, sum?    start, width, group, epsilon
//
// and blocks, z_start of all. p is [..., columns], B [rank, any], bias p's [columns]; z is [..., rank], or without it
// p's columns from z_start on. blocks are [begin, end, first, last, from] each, see call.h; parts are [start, width].
// ids is int64 and has p's first dimensions; with it there are adapters: for each block where each one's rows of B begin
// within first..last, and where those of the last one end.
#include "operators.h"

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "asked.h"
#include "call.h"
#include "entry.h"
#include "host.h"
#include "plan.h"
#if defined(FLORA_CUDA)
#include "device.h"
#endif

namespace flora {
namespace {

struct LoraEntry : Entry {
  Operator op;
};

const LoraEntry* lora_entry_of(const ort::CustomOp* op) { return static_cast<const LoraEntry*>(op); }

const char* name_of(Operator op) {
  return op == Operator::kAdd ? "LoraAdd" : op == Operator::kSwiGLU ? "LoraSwiGLU" : "LoraSkipRMSNorm";
}

// Where each input stands; gamma and skip are those of the norm.
struct Places {
  int bias, z, ids, count;
};

Places places_of(Operator op) { return op == Operator::kNorm ? Places{4, 5, 6, 7} : Places{2, 3, 4, 5}; }

struct Kernel {
  ort::Api* api;
  const LoraEntry* entry;
  Call call;        // what attributes say
  int32_t z_start;  // of p's columns, where z is there
};

ort::Status* read_int(ort::Api* api, const ort::KernelInfo* info, const char* name, int32_t* to) {
  int64_t value = 0;
  FLORA_TRY(ort::GetInt::of(api)(info, name, &value));
  if (value < 0 || value > (1 << 30)) return refuse(api, std::string(name) + " is out of range");
  *to = static_cast<int32_t>(value);
  return nullptr;
}

// Rows of so many numbers each, at least one and at most so many.
ort::Status* read_rows(ort::Api* api, const ort::KernelInfo* info, const char* name, size_t each, size_t most,
                       std::vector<int32_t>* rows) {
  size_t count = 0;
  FLORA_TRY(ort::GetInts::of(api)(info, name, nullptr, &count));
  if (count == 0 || count % each != 0 || count / each > most)
    return refuse(api, std::string(name) + " has " + std::to_string(count) + " numbers; it must have " +
                           std::to_string(each) + " each for at most " + std::to_string(most));
  std::vector<int64_t> numbers(count);
  FLORA_TRY(ort::GetInts::of(api)(info, name, numbers.data(), &count));
  for (int64_t number : numbers) {
    if (number < 0 || number > (1 << 30)) return refuse(api, std::string(name) + " holds a number out of range");
    rows->push_back(static_cast<int32_t>(number));
  }
  return nullptr;
}

ort::Status* read_blocks(ort::Api* api, const ort::KernelInfo* info, Call* call) {
  std::vector<int32_t> rows;
  FLORA_TRY(read_rows(api, info, "blocks", 5, kBlocks, &rows));
  call->blocks = static_cast<int32_t>(rows.size() / 5);
  for (int i = 0; i < call->blocks; ++i) {
    const int32_t* five = rows.data() + 5 * i;
    const Block block{five[0], five[1], five[2], five[3], five[4]};
    if (block.begin > block.end || block.first > block.last) return refuse(api, "a block ends before it begins");
    for (int j = 0; j < i; ++j)
      if (block.begin < call->block[j].end && call->block[j].begin < block.end) return refuse(api, "blocks overlap");
    call->block[i] = block;
  }
  return nullptr;
}

ort::Status* read_adapters(ort::Api* api, const ort::KernelInfo* info, Call* call) {
  size_t count = 0;
  if (ort::Status* missing = ort::GetInts::of(api)(info, "adapters", nullptr, &count)) {
    ort::ReleaseStatus::of(api)(missing);
    return nullptr;  // one for all rows
  }
  std::vector<int32_t> rows;
  FLORA_TRY(read_rows(api, info, "adapters", call->blocks, kEdges / call->blocks, &rows));
  const size_t each = rows.size() / call->blocks;
  call->adapters = static_cast<int32_t>(each) - 1;
  for (size_t i = 0; i < rows.size(); ++i) {
    const Block& block = call->block[i / each];
    if (rows[i] < block.first || rows[i] > block.last || rows[i] > UINT16_MAX || (i % each > 0 && rows[i] < rows[i - 1]))
      return refuse(api, "adapters must follow each other within their blocks");
    call->edge[i] = static_cast<uint16_t>(rows[i]);
  }
  return nullptr;
}

ort::Status* read_parts(ort::Api* api, const ort::KernelInfo* info, Call* call) {
  std::vector<int32_t> rows;
  FLORA_TRY(read_rows(api, info, "parts", 2, kParts, &rows));
  call->parts = static_cast<int32_t>(rows.size() / 2);
  for (int i = 0; i < call->parts; ++i) {
    if (rows[2 * i + 1] == 0) return refuse(api, "a part has no columns");
    call->part[i] = {rows[2 * i], rows[2 * i + 1], call->width};
    call->width += rows[2 * i + 1];
  }
  return nullptr;
}

ort::Status* read_part(ort::Api* api, const ort::KernelInfo* info, const char* start, Call* call) {
  call->parts = 1;
  FLORA_TRY(read_int(api, info, start, &call->part[0].start));
  FLORA_TRY(read_int(api, info, "width", &call->width));
  call->part[0].width = call->width;
  return call->width == 0 ? refuse(api, "width is 0") : nullptr;
}

ort::Status* read_activation(ort::Api* api, const ort::KernelInfo* info, Call* call) {
  char text[32] = {};
  size_t size = sizeof text;
  FLORA_TRY(ort::GetString::of(api)(info, "activation", text, &size));
  const char* known[] = {"silu", "gelu", "gelu_tanh"};
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(text, known[i]) == 0) {
      call->activation = static_cast<Activation>(i);
      return nullptr;
    }
  }
  return refuse(api, std::string("activation is ") + text + "; it must be silu, gelu or gelu_tanh");
}

ort::Status* create(const ort::CustomOp* op, ort::Api* api, const ort::KernelInfo* info, void** made) {
  std::unique_ptr<Kernel> kernel(new (std::nothrow) Kernel{});
  if (!kernel) return ort::CreateStatus::of(api)(ort::kFail, "no memory");
  kernel->api = api;
  kernel->entry = lora_entry_of(op);
  Call& call = kernel->call;
  call.op = kernel->entry->op;
  call.element = kernel->entry->element;
  FLORA_TRY(read_blocks(api, info, &call));
  FLORA_TRY(read_adapters(api, info, &call));
  FLORA_TRY(read_int(api, info, "z_start", &kernel->z_start));
  if (call.op == Operator::kAdd) FLORA_TRY(read_parts(api, info, &call));
  if (call.op == Operator::kSwiGLU) {
    FLORA_TRY(read_part(api, info, "gate", &call));
    FLORA_TRY(read_int(api, info, "up", &call.up));
    FLORA_TRY(read_activation(api, info, &call));
  }
  if (call.op == Operator::kNorm) {
    FLORA_TRY(read_part(api, info, "start", &call));
    FLORA_TRY(read_int(api, info, "group", &call.group));
    FLORA_TRY(ort::GetFloat::of(api)(info, "epsilon", &call.epsilon));
    if (call.group == 0 || call.width % call.group != 0) return refuse(api, "width is not a multiple of group");
  }
  *made = kernel.release();
  return nullptr;
}

const void* at(const void* data, int64_t index, Element element) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + index * size_of(element);
}

// Why these shapes cannot be, or nothing.
std::string wrong(const Call& call, int64_t z_start, const Input& p, const Input& b, const Input& bias, const Input& z,
                  const Input& gamma, const Input& skip, const Input& ids) {
  if (p.shape.empty() || b.shape.size() != 2) return "p must have columns, and B two dimensions";
  const int64_t rank = b.shape[0], columns = b.shape[1];
  if (columns > INT_MAX || rank > INT_MAX || p.last() > INT_MAX) return "p or B is too large";
  if (!z.given() && z_start + rank > p.last()) return "z reaches beyond p";
  if (z.given() && (z.last() < rank || z.rows() != p.rows())) return "z does not have the rows of p and the rank of B";
  if (bias.given() && (bias.shape.size() != 1 || bias.last() != p.last())) return "bias does not have p's columns";
  for (int i = 0; i < call.parts; ++i)
    if (call.part[i].start + call.part[i].width > p.last()) return "a part reaches beyond p";
  if (call.op == Operator::kSwiGLU && call.up + call.width > p.last()) return "a part reaches beyond p";
  for (int i = 0; i < call.blocks; ++i) {
    const Block& block = call.block[i];
    if (block.end > p.last()) return "a block reaches beyond p";
    if (block.from + block.end - block.begin > columns || block.last > rank) return "a block reaches beyond B";
  }
  if (ids.given() != (call.adapters > 0)) return "ids and adapters are for each other";
  if (ids.given()) {
    if (ids.shape.size() >= p.shape.size() || !std::equal(ids.shape.begin(), ids.shape.end(), p.shape.begin()))
      return "ids does not have the first dimensions of p";
    if (p.rows() > INT_MAX) return "p has too many rows";
  }
  if (call.op == Operator::kNorm) {
    if (gamma.shape.size() != 1 || gamma.last() != call.group) return "gamma does not have as many numbers as a group";
    if (skip.given() && (skip.last() != call.width || skip.rows() != p.rows())) return "skip has another shape";
  }
  return {};
}

struct Work {
  const Call* call;
  const Plan* plan;
  RunBlock run;
  int64_t blocks, batches;
};

void run_batch(void* data, size_t batch) {
  const Work& work = *static_cast<const Work*>(data);
  const int64_t from = work.blocks * static_cast<int64_t>(batch) / work.batches;
  const int64_t to = work.blocks * (static_cast<int64_t>(batch) + 1) / work.batches;
  for (int64_t i = from; i < to; ++i) work.run(*work.call, *work.plan, i);
}

ort::Status* run_on_host(ort::Api* api, const ort::KernelContext* context, const Call& call) {
  const Plan plan = plan_for_host(call);
  Work work{&call, &plan, find_host_block(call, plan), plan.down * plan.across, 0};
  constexpr int64_t kEnough = 1 << 14;  // of numbers, to be worth a thread
  const int64_t most = (call.rows * call.width + kEnough - 1) / kEnough;
  work.batches = work.blocks < most ? work.blocks : most;
  if (work.batches <= 1) {
    work.batches = 1;
    run_batch(&work, 0);
    return nullptr;
  }
  return ort::ParallelFor::of(api)(context, run_batch, static_cast<size_t>(work.batches), 0, &work);
}

ort::Status* compute(void* opaque, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(opaque);
  ort::Api* api = kernel.api;
  Call call = kernel.call;
  const Places places = places_of(call.op);
  const bool norm = call.op == Operator::kNorm;
  Input p, b, bias, z, gamma, skip, ids;
  FLORA_TRY(read_input(api, context, 0, &p));
  FLORA_TRY(read_input(api, context, 1, &b));
  FLORA_TRY(read_input(api, context, places.bias, &bias));
  FLORA_TRY(read_input(api, context, places.z, &z));
  FLORA_TRY(read_input(api, context, places.ids, &ids));
  if (norm) {
    FLORA_TRY(read_input(api, context, 2, &gamma));
    FLORA_TRY(read_input(api, context, 3, &skip));
  }
  const std::string why = wrong(call, kernel.z_start, p, b, bias, z, gamma, skip, ids);
  if (!why.empty()) return refuse(api, std::string(name_of(call.op)) + ": " + why);

  call.rows = p.rows();
  call.stride = p.last();
  call.columns = static_cast<int32_t>(b.shape[1]);
  call.p = p.data;
  call.b = b.data;
  call.bias = bias.data;
  call.z = z.given() ? z.data : at(p.data, kernel.z_start, call.element);
  call.z_stride = z.given() ? z.last() : call.stride;
  call.z_bias = z.given() ? nullptr : at(bias.data, kernel.z_start, call.element);
  call.gamma = gamma.data;
  call.skip = skip.data;
  call.ids = static_cast<const int64_t*>(ids.data);
  if (ids.given() && call.rows > 0) call.share = static_cast<int32_t>(call.rows / (ids.rows() * ids.last()));

  std::vector<int64_t> shape = p.shape;
  shape.back() = call.width;
  FLORA_TRY(make_output(api, context, 0, shape, &call.out));
  if (norm) FLORA_TRY(make_output(api, context, 1, shape, &call.sum));
  if (call.rows == 0) return nullptr;
#if defined(FLORA_CUDA)
  if (kernel.entry->on_device) return start_on_device(api, context, name_of(call.op), call, run_on_device);
#endif
  return run_on_host(api, context, call);
}

LoraEntry make_entry(Operator op, Element element, bool on_device) {
  LoraEntry entry = new_entry<LoraEntry, Kernel>(element, on_device, create, compute);
  entry.op = op;
  entry.get_name = [](const ort::CustomOp* it) { return name_of(lora_entry_of(it)->op); };
  entry.get_input_type = [](const ort::CustomOp* it, size_t index) {
    const bool ids = static_cast<int>(index) == places_of(lora_entry_of(it)->op).ids;
    return ids ? ort::kInt64 : type_of(entry_of(it)->element);
  };
  entry.get_input_count = [](const ort::CustomOp* it) -> size_t { return places_of(lora_entry_of(it)->op).count; };
  entry.get_output_count = [](const ort::CustomOp* it) -> size_t {
    return lora_entry_of(it)->op == Operator::kNorm ? 2 : 1;
  };
  entry.get_input_characteristic = [](const ort::CustomOp* it, size_t index) {
    const size_t required = lora_entry_of(it)->op == Operator::kNorm ? 3 : 2;
    return index < required ? ort::kRequired : ort::kOptional;
  };
  return entry;
}

const std::vector<LoraEntry>& entries() {
  static const std::vector<LoraEntry>* const all = [] {  // for as long as the process lives, as sessions may
    auto* made = new std::vector<LoraEntry>;
    for (Operator op : {Operator::kAdd, Operator::kSwiGLU, Operator::kNorm})
      add_entries(made, [op](Element element, bool on_device) { return make_entry(op, element, on_device); });
    return made;
  }();
  return *all;
}

}  // namespace

size_t operator_count() { return entries().size(); }
const ort::CustomOp* operator_at(size_t index) { return &entries()[index]; }

}  // namespace flora
