// Which instruction set the kernels use.
#pragma once

namespace fastalign {

enum class Isa { scalar, neon, avx2, avx512 };

// The best that this machine and this build have, or what a test selected.
Isa isa() noexcept;

// This machine has it, and this build holds kernels for it.
bool has(Isa isa) noexcept;

// BF16 dot products beside AVX-512; a build without kernels for them does not ask.
bool has_avx512_bf16() noexcept;

}  // namespace fastalign
