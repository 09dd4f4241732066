"""The old address of configs.files, for branches that are under way; it goes with them."""

from configs.files import disk_errors, part_name, sync_folder, write_whole

__all__ = ["disk_errors", "part_name", "sync_folder", "write_whole"]
