// SPDX-License-Identifier: MIT
/*
 * philox: counter-based noise that is the same everywhere.
 *
 * Philox4x32-10 (Salmon et al., SC'11) keyed by the request's seed; the counter holds (element block, draw, image, 0), so a number
 * depends on (seed, image, draw, element) and never on how many calls came before. Integers are exact by construction. The
 * normals are Box-Muller with our own log and sin/cos polynomials in explicit fma, compiled with -ffp-contract=off, so that CPU and GPU
 * agree bit for bit (no libm call, no table). One counter gives four normals: elements 4b .. 4b+3.
 *
 * Header-only so that C, AVX code and CUDA compile the same text. philox_normal4 and philox_normal are the whole interface.
 */
#ifndef KERN_PHILOX_H
#define KERN_PHILOX_H
#include <stdint.h>
/* filled in by kernels/: see philox_normal4(seed, image, draw, block, float out[4]) */
#endif
