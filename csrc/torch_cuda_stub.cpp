// Stands in for libtorch_cuda.so where only the CPU build of torch is installed (FASTUNLEARN_CUDA=check): the
// three symbols that the CUDA binding needs, so that it links with -z defs and an unresolved name is an error
// at build time. Never loaded.
extern "C" {
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
int torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) { return 1; }
void torch_c10_cuda_free_error_msg(char*) {}
}
