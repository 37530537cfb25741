/* What every native function of fastalign shares: status codes, element types, the version, the instruction set.
 *
 * The interface is C: plain pointers, sizes and strides. It allocates nothing that outlives a call, keeps no pointer, and
 * never throws; a function that can fail returns a status. Functions may be called from several threads at once.
 */
#ifndef FASTALIGN_NATIVE_H
#define FASTALIGN_NATIVE_H

#include <stdint.h>

#if defined(__GNUC__)
#define FASTALIGN_API __attribute__((visibility("default")))
#else
#define FASTALIGN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised with every change of a signature, a struct or a meaning; callers compare it with fastalign_version(). */
#define FASTALIGN_VERSION 1

typedef enum fastalign_status {
    FASTALIGN_OK = 0,
    FASTALIGN_BAD_ARGUMENT = 1, /* a null pointer, a negative size, a stride shorter than a row */
    FASTALIGN_UNSUPPORTED = 2,  /* an element type, or an instruction set that this machine or build lacks */
    FASTALIGN_NO_MEMORY = 3     /* no room for the scratch of one call */
} fastalign_status;

typedef enum fastalign_dtype {
    FASTALIGN_FLOAT32 = 0,
    FASTALIGN_BFLOAT16 = 1,
    FASTALIGN_FLOAT16 = 2
} fastalign_dtype;

/* FASTALIGN_VERSION of the library. */
FASTALIGN_API int fastalign_version(void);

/* The instruction set in use: "avx512", "avx2", "neon" or "scalar". The best that the machine has, until one is selected. */
FASTALIGN_API const char *fastalign_isa(void);

/* Use another instruction set from now on, in every thread; for tests and measurements. "best" undoes it.
 * FASTALIGN_UNSUPPORTED, and no change, for one that this machine or build lacks. */
FASTALIGN_API int fastalign_select_isa(const char *name);

/* "openmp" if parallel work runs on the threads of an OpenMP runtime that the process has loaded, else "threads":
 * threads started for the call. Looked up once, when the first parallel work begins. */
FASTALIGN_API const char *fastalign_threading(void);

#ifdef __cplusplus
}
#endif

#endif
