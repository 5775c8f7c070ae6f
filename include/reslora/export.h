// Marks what libreslora.so exports; everything else has hidden visibility.
#pragma once

#define RESLORA_API __attribute__((visibility("default")))
