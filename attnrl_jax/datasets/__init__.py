"""Problems from files and names: read, cleaned, prepared once, drawn as a stream."""
