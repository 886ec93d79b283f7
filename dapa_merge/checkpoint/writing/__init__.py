"""Making a result on disk: beside its place, proved as it is written, and under its name only when it is complete."""
