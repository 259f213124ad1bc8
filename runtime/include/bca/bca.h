/* The C interface, for callers in C, Rust, Go, C# and Python: open, describe, run, self-test, last error, close.
 *
 * Functions that can fail return BCA_OK or the kind of error; bca_last_error then has the message. A session may be used
 * by any number of threads at once; closing it needs it for itself. Structures only grow at their end: set `size` to
 * sizeof the structure, and the rest to zero where you do not need it.
 */
#ifndef BCA_H
#define BCA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BCA_PUBLIC __attribute__((visibility("default")))

typedef struct bca_session bca_session;

typedef enum bca_status {
  BCA_OK = 0,
  BCA_INPUT_ERROR = 1,      /* an input, output or option that cannot be used; nothing was run */
  BCA_BUNDLE_ERROR = 2,     /* missing, damaged, unsafe or of a newer format */
  BCA_ENGINE_ERROR = 3,     /* the backend does not work here ("auto": none does), or a run failed: do not use its outputs */
  BCA_MISSING_LIBRARY = 4,  /* onnxruntime, TensorRT or CUDA does not load */
  BCA_PARITY_ERROR = 5,     /* the self-test is out of bounds */
  BCA_OTHER_ERROR = 6       /* anything else, such as no memory */
} bca_status;

typedef enum bca_dtype {
  BCA_FLOAT32 = 0, BCA_FLOAT16, BCA_BFLOAT16, BCA_FLOAT64, BCA_BOOL, BCA_INT8, BCA_UINT8, BCA_INT16, BCA_UINT16, BCA_INT32,
  BCA_UINT32, BCA_INT64, BCA_UINT64
} bca_dtype;

typedef enum bca_memory { BCA_CPU = 0, BCA_CUDA = 1 } bca_memory;
typedef enum bca_verify { BCA_VERIFY_FULL = 0, BCA_VERIFY_SIZE = 1, BCA_VERIFY_OFF = 2 } bca_verify;

/* Null strings and zeros are the defaults of bca::Options, which documents each. */
typedef struct bca_open_options {
  size_t size;
  const char* backend;              /* "auto", "tensorrt", "rtx", "onnxruntime-cuda", "onnxruntime-cpu" */
  const char* precision;            /* "fp32", "fp16", "bf16" */
  int32_t threads;
  int32_t verify;                   /* bca_verify */
  const char* onnxruntime_library;
  const char* tensorrt_library;
  const char* cuda_library;
  int32_t device;
  int32_t contexts;
  int32_t host_code;
  int64_t no_spinning;              /* 1: Options::spinning = false. 64 bits, to lie beyond the padding of older structures */
} bca_open_options;

typedef struct bca_run_options {
  size_t size;
  int32_t cast;                     /* take other floating-point types, and masks of 0 and 1 */
  void* stream;                     /* a cudaStream_t, for engines; see bca::Session::run_into */
} bca_run_options;

/* The caller's memory, C-contiguous, borrowed until the call returns; GPU memory with a stream, until that has done the work.
 * Outputs may overlap neither each other nor an input, and GPU memory is aligned to 256 bytes. Tensors of one list have one size. */
typedef struct bca_tensor {
  size_t size;
  const char* name;
  void* data;                       /* inputs are not written to */
  const int64_t* shape;
  int32_t rank;
  int32_t dtype;                    /* bca_dtype */
  int32_t memory;                   /* bca_memory */
} bca_tensor;

/* Opens a bundle's directory. `options` may be null. On success *session is to be closed with bca_close. */
BCA_PUBLIC bca_status bca_open(const char* bundle, const bca_open_options* options, bca_session** session);

/* Runs the model into the caller's outputs: all of them, each of its type and shape. `options` may be null. */
BCA_PUBLIC bca_status bca_run(const bca_session* session, const bca_tensor* inputs, size_t input_count, const bca_tensor* outputs,
                              size_t output_count, const bca_run_options* options);

/* What runs, as JSON: backend, precision, inputs, outputs, dims, chosen, passed_over. Lives as long as the session. */
BCA_PUBLIC const char* bca_describe(const bca_session* session);

BCA_PUBLIC bca_status bca_selftest(const bca_session* session);

/* The message of the last error on this thread; it lives until this thread's next call that fails. Never null. */
BCA_PUBLIC const char* bca_last_error(void);

/* Null is allowed. */
BCA_PUBLIC void bca_close(bca_session* session);

BCA_PUBLIC const char* bca_version(void);

#ifdef __cplusplus
}
#endif

#endif /* BCA_H */
