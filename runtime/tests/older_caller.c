/* A caller of the first C interface with sizes, as it was compiled then: its own declarations, frozen, and no bca.h. Structures
 * have grown since, or will; what is here must run as it is.
 *
 *   older_caller LIBRARY BUNDLE    prints the first value of each output
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>

typedef struct {
  size_t size;
  const char* backend;
  const char* precision;
  int32_t threads;
} open_options;

typedef struct {
  size_t size;
  const char* name;
  void* data;
  const int64_t* shape;
  int32_t rank;
  int32_t dtype;
} tensor; /* without `memory`, which is then the CPU's */

typedef int (*open_function)(const char*, const open_options*, void**);
typedef int (*run_function)(const void*, const tensor*, size_t, const tensor*, size_t, const void*);
typedef void (*close_function)(void*);
typedef const char* (*error_function)(void);

int main(int count, char** words) {
  void* library = count == 3 ? dlopen(words[1], RTLD_NOW) : NULL;
  if (!library) return 3;
  const open_options options = {sizeof options, "onnxruntime-cpu", NULL, 1};
  static float x[4 * 8], context[3 * 6], out[4 * 8], context_out[3 * 6];
  const int64_t x_shape[] = {1, 4, 8}, context_shape[] = {1, 3, 6};
  const tensor inputs[] = {{sizeof(tensor), "x", x, x_shape, 3, 0}, {sizeof(tensor), "context", context, context_shape, 3, 0}};
  const tensor outputs[] = {{sizeof(tensor), "out", out, x_shape, 3, 0}, {sizeof(tensor), "context_out", context_out, context_shape, 3, 0}};
  void* session = NULL;
  for (int i = 0; i < 32; ++i) x[i] = (float)i / 32;
  for (int i = 0; i < 18; ++i) context[i] = (float)i / 18;
  int status = ((open_function)dlsym(library, "bca_open"))(words[2], &options, &session);
  if (status == 0) status = ((run_function)dlsym(library, "bca_run"))(session, inputs, 2, outputs, 2, NULL);
  if (status != 0) fprintf(stderr, "%s\n", ((error_function)dlsym(library, "bca_last_error"))());
  else printf("%.9g %.9g\n", out[0], context_out[0]);
  ((close_function)dlsym(library, "bca_close"))(session);
  return status;
}
