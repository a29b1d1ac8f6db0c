/* Lets an AMD processor run what an Intel one would: MKL's code for Intel processors, and nanorlhf's choices for them.
 *
 *     gcc -shared -fPIC -o intel_code.so intel_code.c -ldl
 *     sed s/AuthenticAMD/GenuineIntel/ /proc/cpuinfo > intel_cpuinfo
 *     LD_PRELOAD=./intel_code.so python -m nanorlhf.bench ...
 *
 * MKL asks one of its own functions whether the processor is Intel's; here the answer is yes. /proc/cpuinfo is read from the file
 * intel_cpuinfo. The times remain those of the AMD processor.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>

int mkl_serv_intel_cpu(void) { return 1; }
int mkl_serv_intel_cpu_true(void) { return 1; }

int open64(const char *path, int flags, ...) {
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    va_list rest;
    va_start(rest, flags);
    int mode = va_arg(rest, int);
    va_end(rest);
    return real(strcmp(path, "/proc/cpuinfo") ? path : "intel_cpuinfo", flags, mode);
}
