"""The build cache: files of earlier builds, looked up by a digest of all build inputs."""
