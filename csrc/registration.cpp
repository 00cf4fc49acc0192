// An empty module: importing it runs the STABLE_TORCH_LIBRARY_IMPL blocks of the other files. Schemas stand in Python.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
