// Half-precision elements as they lie in memory.
#pragma once

#include <cstdint>

namespace fastalign {

struct BF16 {
    uint16_t bits;
};

struct FP16 {
    uint16_t bits;
};

}  // namespace fastalign
