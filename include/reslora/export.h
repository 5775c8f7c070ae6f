/// @file
/// Marks what libreslora.so exports; everything else has hidden visibility.
#pragma once

/// Before a class or function that programs may use.
#define RESLORA_API __attribute__((visibility("default")))
