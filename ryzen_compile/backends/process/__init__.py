"""Child processes that run builds, with limits on memory and time; a child process ends with its parent."""
