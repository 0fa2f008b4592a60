"""Class folders: SOURCE/<class>/**/<video or image>, the folder is the label."""

from __future__ import annotations

from mdltool.data.formats.common import VIDEO_SUFFIXES, finished, key_of, label_of, relative_name, walk_videos
from mdltool.data.formats.query import Query
from mdltool.errors import MdlError
from mdltool.types import IMAGE_SUFFIXES, Clip, Listing, is_image


def read(query: Query) -> Listing:
    """List the videos and images of class folders; classes are the folders' names, sorted, unless `classes` fixes
    them. An image beside a video of the same name is its thumbnail and left out.

    Raises MdlError for a missing source, no class folder, an empty one, one that is not in `classes`, and for
    folders of splits where class folders should be.
    """
    source = query.folder()
    if query.annotations is not None:
        fix = "leave --annotations out, or --format csv"
        raise MdlError("class folders need no annotations", query.annotations, fix)
    folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise MdlError("there are no class folders here", source, "expected: SOURCE/<class>/<video or image>")
    inner = source / query.split
    if inner in folders and any(p.is_dir() for p in inner.iterdir()):
        what = f"these are folders of splits, not of classes: '{query.split}'"
        raise MdlError(what, source, f"give {inner} as SOURCE")
    names = query.classes or tuple(folder.name for folder in folders)
    clips, empty, thumbnails = [], [], 0
    for folder in folders:
        files = list(walk_videos(folder, VIDEO_SUFFIXES | IMAGE_SUFFIXES))
        if not files:
            empty.append(folder)
        label = label_of(folder.name, names, str(folder))
        videos = {file.with_suffix("") for file in files if not is_image(file)}
        for video in files:
            if is_image(video) and video.with_suffix("") in videos:
                thumbnails += 1
                continue
            clips.append(Clip(key_of(relative_name(video, source)), video, label))
    if empty:
        also = f", and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise MdlError(
            f"the class folder holds no video and no image{also}", empty[0], "remove the folder, or fill it"
        )
    notes = ["labels: " + query.origin("the folders' names, sorted")]
    if thumbnails:
        notes.append(f"images beside videos of their name, left out: {thumbnails}")
    return finished(names, clips, (), notes, source)
