# Read by the build of llama-cpp-python after its project() (see setup-llama-cpp.sh), so that it takes half the time.
# The package does not load the library of the command-line tools; a variable like this one goes before the cache.
set(LLAMA_BUILD_COMMON OFF)
# What computes is in libggml; libllama reads files and texts and lays out graphs.
cmake_language(DEFER CALL target_compile_options llama PRIVATE -O1)
