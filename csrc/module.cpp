// An empty Python module: importing it loads the library, whose ops then register themselves with torch.
#include <Python.h>

#define ALST_JOIN_(a, b) a##b
#define ALST_JOIN(a, b) ALST_JOIN_(a, b)
#define ALST_STRING_(a) #a
#define ALST_STRING(a) ALST_STRING_(a)

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, ALST_STRING(TORCH_EXTENSION_NAME), nullptr, 0, nullptr};

PyMODINIT_FUNC ALST_JOIN(PyInit_, TORCH_EXTENSION_NAME)() { return PyModule_Create(&definition); }
