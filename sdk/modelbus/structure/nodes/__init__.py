"""What kinds of annotations mean, a module for each: the JSON Schema of their values, and how decoded JSON becomes one."""
