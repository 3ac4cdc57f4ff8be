/* decode.c - the version of the decoders' interface. */
#include "decode.h"

int dec_abi(void)
{
	return 1;
}
