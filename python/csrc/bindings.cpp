// reslora._C: the C++ functions that the package and its tests call; pybind11 is in this folder
// only.
//
// Errors: a c10::Error becomes the Python exception of the same name, with its one sentence and
// without the C++ backtrace; see on_disk for those of the system. Long calls release the GIL;
// `progress` takes it back by itself. Importing this module loads libreslora.so, which registers
// the ops of torch.ops.reslora.
#include "bindings.h"

#include <reslora/ops.h>

namespace reslora::python {
namespace {

void translate_errors(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const NotFound& e) {
    PyErr_SetString(PyExc_FileNotFoundError, e.what());
  } catch (const SystemRefusal& e) {
    PyErr_SetString(PyExc_OSError, e.what());
  } catch (const c10::ValueError& e) {
    PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
  } catch (const c10::TypeError& e) {
    PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
  } catch (const c10::IndexError& e) {
    PyErr_SetString(PyExc_IndexError, e.what_without_backtrace());
  } catch (const c10::NotImplementedError& e) {
    PyErr_SetString(PyExc_NotImplementedError, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
  }
}

}  // namespace
}  // namespace reslora::python

PYBIND11_MODULE(_C, m) {
  namespace own = reslora::python;
  m.doc() = "The C++ side of reslora.";
  pybind11::register_local_exception_translator(&own::translate_errors);
  m.def("check_single_copy", &reslora::check_single_copy,
        "Refuse to run beside another libreslora, whose ops were registered before ours.");
  own::bind_config(m);
  own::bind_chain(m);
  own::bind_matching(m);
  own::bind_views(m);
  own::bind_merge(m);
  own::bind_calibration(m);
  own::bind_files(m);
  own::bind_model_files(m);
  pybind11::module_ formulas = m.def_submodule("formulas", "The paper's formulas, literally.");
  own::bind_formulas(formulas);
}
