// One op's kernel for one instruction set: compiled with -DFASTUNLEARN_OP=<op>
// -DFASTUNLEARN_ISA=portable|avx2|avx512.
#define FASTUNLEARN_QUOTE_(x) #x
#define FASTUNLEARN_QUOTE(x) FASTUNLEARN_QUOTE_(x)
#define FASTUNLEARN_HEADER(op) FASTUNLEARN_QUOTE(op.h)
#include FASTUNLEARN_HEADER(FASTUNLEARN_OP)
