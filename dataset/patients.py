"""Patients, recognised from the names of files and folders, so that no patient is in both splits.

A data set's own rule is a regular expression (`patient` in its JSON file, `--patient`). Without one, these are known:

    00124_80.png                 BraTS, LiTS, RESC: patient number, slice number; not if the first is a date
    CNV-6294785-2.jpeg           OCT2017: one of its four classes, patient number, image number
    sub-01_T1w_slice003.jpg      BIDS
    BraTS2021_00124_80.png       BraTS as distributed
    patient12_slice3.png         also pat_0001_ax_12, subject-3_x, case_7_2, person12_virus_3
    P012_S03.png, A001-0012.png  letters with the patient number, then the image number
    10003_left.jpeg              patient number, then a side: left, right, OD, OS, L, R
    TCGA_CS_4941_19960909_1.tif  TCIA: TCGA, LIDC-IDRI-0001, and CBIS-DDSM's P_00001
    normal/patient01/x.jpg       a folder inside a class folder

Any other word with two numbers, as in tile_12_40.png, is not a patient, as it is often a position.
"""

import hashlib
import os
import re
from pathlib import PurePosixPath

from utils import blame

SIDE = r"(?i:left|right|od|os|l|r)(?:[_-]\d{1,6})?"
NUMBER = re.compile(rf"(?:(\d+)[_-]\d{{1,6}}|(?:CNV|DME|DRUSEN|NORMAL)-(\d+)-\d+|(?:[A-Za-z]+[_-])?(\d+)[_-]{SIDE})")
# Names of public archives, which may also contain dates.
ARCHIVES = re.compile(
    r"(?:^|[_-])(sub-[A-Za-z0-9]+|TCGA[_-][A-Z0-9]{2}[_-][A-Z0-9]{4}|LIDC-IDRI-\d{4}|P_\d{5})(?![A-Za-z0-9])"
)
RULES = (
    re.compile(r"(?i:^|[_-])((?i:brats\d*)[_-](?:[A-Za-z]+[_-])*\d+)"),
    re.compile(r"(?:^|[_-])((?i:patient|person|pat|patid|subject|subj|sub|case|pid)[_-]?\d+)(?![A-Za-z0-9])"),
    re.compile(r"^(NORMAL\d-IM-\d+)-\d+$"),  # Kermany's chest X-rays, beside person12_virus_3
    re.compile(r"^IM-(\d{4})-\d{4}$"),
    re.compile(r"^([A-Za-z]{1,3}\d{2,})[_-](?:[A-Za-z]{0,3})\d+$"),
)
CAMERAS = {"img", "image", "dsc", "dscn", "dscf", "dcim", "pxl", "pic", "photo", "p", "scan", "screenshot", "vid",
           "mvimg"}  # fmt: skip
DATE = re.compile(r"(?:19|20)\d\d[_-]?(?:0[1-9]|1[0-2])[_-]?(?:0[1-9]|[12]\d|3[01])(?!\d)|\d{6}[_-]\d{6}$")


def compile_rule(text: str, where: str) -> re.Pattern[str]:
    """Compile a data set's regular expression; raises `InputError`, which begins with `where`."""
    with blame(f"{where} {text!r:.80}: not a regular expression", errors=(re.error, RecursionError, OverflowError)):
        return re.compile(text)


def patient(name: str, rule: re.Pattern[str] | None = None, below: str | None = None) -> str | None:
    """The patient of an image, according to its name, or None if unknown.

    Args:
        name: the path below the data set's folder.
        rule: searched anywhere in `name`; the patient is its first group, or the whole match if it has no group.
        below: the path below the class's folder; None: the file name only.
    """
    if rule is not None:
        match = rule.search(name)
        return (match[1] if rule.groups else match[0]) or None if match else None
    *folders, file = PurePosixPath(below or PurePosixPath(name).name).parts
    for part in (*folders, re.sub(r"(?i:\.nii)?\.[^.]*$", "", file)):
        if result := _known(part):
            return result
    # Any other folder is taken as a patient if its name has a number and is not a date.
    return next((folder for folder in folders if re.search(r"\d", folder) and not DATE.search(folder)), None)


def _known(text: str) -> str | None:
    if match := ARCHIVES.search(text):
        return match[1]
    if DATE.search(text):
        return None
    for rule in RULES:
        if (match := rule.search(text)) and re.split(r"[\d_-]", match[1])[0].lower() not in CAMERAS - {"p"}:
            return match[1]
    match = NUMBER.fullmatch(text)
    is_camera = re.split(r"[\d_-]", text)[0].lower() in CAMERAS
    return None if match is None or is_camera else next(filter(None, match.groups()))


def spelled_alike(name: str) -> str:
    """A normal form that all spellings of a patient share: Patient12, patient_12 and patient-012 are the same."""
    joined = re.sub(r"(?<!\d)[\W_]+|[\W_]+(?!\d)", "", name.casefold())  # separators between two numbers stay
    return re.sub(r"(?<!\d)0+(?=\d)", "", joined)


def falls_in_valid(name: str, share: float, patient_id: str | None = None) -> bool:
    """Whether an image in a folder that both splits share is in valid, by a hash of its patient, or else of its name.

    The split does not depend on other files, seed or machine, and each patient is in one split (the rule of the Speech
    Commands data set, Warden 2018).
    """
    digest = hashlib.sha256(os.fsencode(patient_id or name)).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
