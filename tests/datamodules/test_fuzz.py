"""Damaged tables, lists and documents: each is read or refused in one sentence, and none ends in a traceback.

Every kind has a small sound original that hypothesis damages: bytes, cells, rows, quotes, encodings, types, check sums.
By default a few inputs of each kind are tried, the same ones every time; ``MEDMIM_FUZZ=700`` tries so many of each, and
``pytest -s`` then shows how many were refused.
"""

import gzip
import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from common.errors import UserError
from datamodules.brain.labels import LabelSource, label_tables, read_classes
from datamodules.brain.manifest import find_manifest as find_datalist
from datamodules.genetics.association import _covariates
from datamodules.genetics.genotypes import open_genotypes
from datamodules.genetics.kinship import read_kinship
from datamodules.genetics.scores import read_burden, read_score, read_score_table
from datamodules.genetics.tcga import TCGAGrade, read_omics
from datamodules.genetics.ukb import european, find_ukb, read_phenotypes
from datamodules.images.reading import ImageError
from datamodules.images.table import find_table
from datamodules.labelled.chexpert import CheXpert
from datamodules.labelled.covid import CovidFindings
from datamodules.labelled.fundus import APTOS2019, RFMiD
from datamodules.labelled.layout import LabelledTable
from datamodules.labelled.nih_cxr import NIHChestXray14
from datamodules.labelled.rsna import RSNAPneumonia
from datamodules.labelled.siim import SIIMPneumothorax, decode_runs
from datamodules.pairs.answers import accepted_answers, normalised_answer
from datamodules.pairs.vqa import find_slake, find_vqa_med, find_vqa_rad
from datamodules.reports.covid_cxr import find_covid
from datamodules.reports.medicat import read_figures
from datamodules.reports.melinda import read_melinda
from datamodules.reports.mimic_cxr import find_studies as find_mimic
from datamodules.reports.open_i import find_studies as find_open_i
from datamodules.reports.open_i import open_i_text
from datamodules.reports.roco import find_roco
from datamodules.splits import SplitFile, assign_splits, listed_split
from datamodules.tables import read_table
from datamodules.tree import Tree
from datamodules.volumes.cases import Case
from datamodules.volumes.folder import find_cases
from datamodules.volumes.pi_cai import read_marksheet

INPUTS = int(os.environ.get("MEDMIM_FUZZ", "12"))
#: What tears parsers: separators, encodings, numbers that are none, other types, paths, entities, long words.
TOKENS = [
    *(sign.encode() for sign in ("", *",;|#='\"\\/<", " ", "\t", "\n", "\r", "\r\n", "\0", '""', "../", "\x1b[31m")),
    *(text.encode() for text in ("é\u2028\u0085", "²٣", "e\u0301", "\ufeff")),
    *(b"\xe9", b"\xff\xfe"),
    *(b"nan", b"NA", b"n/a", b"None", b"inf", b"-inf", b"1e400", b"-1", b"0", b"00", b"1.5", b"1_000", b"0x10"),
    *(b"9007199254740993", b"9" * 25, b"9" * 5000, b"a" * 300, b"a/" * 2000, b"(" * 200, b"[" * 3000),
    *(b"{", b"}", b"[]", b"{}", b"null", b"true", b"5", b'"x"', b"[1]", b'{"a":1}', b"\\ud800", b"\\u0000"),
    *(b"<!DOCTYPE a>", b"&x;", b"<!--", b"]]>"),
]
_CELL = re.compile(rb"[^,\t\n\"{}\[\]:<> ]+")


class Kind(NamedTuple):
    """One kind of file: other files it needs, where it lies, what it holds when sound, and who reads it."""

    path: str
    sound: bytes
    read: Callable[[Path], object]
    others: dict[str, bytes] = {}
    wrap: Callable[[bytes], bytes] | None = None


def lines(*rows):
    return ("\n".join(rows) + "\n").encode()


def tgz(report):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for number in (1, 2):
            member = tarfile.TarInfo(f"ecgen-radiology/{number}.xml")
            member.size = len(report)
            archive.addfile(member, io.BytesIO(report))
    return file.getvalue()


def zipped(table):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("table.csv", table)
    return file.getvalue()


def hdf5():
    h5py = pytest.importorskip("h5py")
    file = io.BytesIO()
    with h5py.File(file, "w") as made:
        made["G"] = np.arange(6, dtype=np.float32).reshape(2, 3)
    return file.getvalue()


def parquet():
    file = io.BytesIO()
    pd.DataFrame({"image": ["a.png", ""], "text": ["x", "y"], "subject": [1001, None]}).to_parquet(file)
    return file.getvalue()


CASES = [Case(f"{i:04d}", f"p{i}", {}) for i in range(1, 5)]
LABELS = lines("image,subject,split,fluid", "a.png,p1,train,1", "b.png,p2,val,0", 'c.png,"p3",test,')
SPLIT = lines("case_id,split", "0001,train", "0002,train", "0003,val", "0004,test")
PGS = lines("#pgs_id=PGS1", "#genome_build=GRCh37", "#HmPOS_build=GRCh38",
            "rsID\tchr_name\tchr_position\teffect_allele\tother_allele\teffect_weight\tis_dominant\thm_chr\thm_pos",
            "rs1\t1\t100\tA\tG\t0.5\tFalse\t1\t110", "rs2\tX\t200\tT\tC\t-0.1\tTrue\t\t")  # fmt: skip
PACKED = gzip.compress(PGS + PGS.splitlines(keepends=True)[-1] * 20, mtime=0)
SSCORE = lines("#FID\tIID\tALLELE_CT\tNAMED_ALLELE_DOSAGE_SUM\tSCORE1_AVG", "1\ta\t2\t3\t0.5", "2\tb\t2\t3\tnan")
BIM = lines("1\trs1\t0\t100\tA\tG", "1\trs2\t0\t200\tC\tT")
FAM = lines("f1 1 0 0 1 -9", "f2 2 0 0 2 -9", "f3 -3 0 0 2 -9")
TRIPLE = {"g.bim": BIM, "g.fam": FAM, "g.bed": b"\x6c\x1b\x01\x00\x01"}
XML = lines('<?xml version="1.0" encoding="utf-8"?>', "<eCitation><MedlineCitation><Abstract>",
            '<AbstractText Label="FINDINGS">Heart &amp; lungs XXXX.</AbstractText>', "<AbstractText/>",
            '</Abstract></MedlineCitation><parentImage id="CXR1_1"/></eCitation>')  # fmt: skip
QUESTION = {"qid": 1, "image_name": "a.jpg", "question": "Is it?", "answer": "yes", "answer_type": "CLOSED ",
            "question_type": "PRES", "phrase_type": "freeform"}  # fmt: skip
SLAKE = {"qid": 3, "img_name": "x/a.jpg", "question": "Is it?", "answer": "No", "q_lang": "en", "answer_type": "CLOSED",
         "content_type": "Organ"}  # fmt: skip
FIGURE = {"pdf_hash": "abc", "fig_uri": "1-Figure1-1.png", "s2_caption": "A chest radiograph here", "radiology": True,
          "s2orc_references": ["One reference about it."], "s2orc_caption": None}  # fmt: skip
MIMIC = {
    "jpg/mimic-cxr-2.0.0-split.csv.gz": gzip.compress(lines("dicom_id,study_id,subject_id,split", "a-1,50,10,train")),
    "jpg/mimic-cxr-2.0.0-metadata.csv.gz": gzip.compress(
        lines("dicom_id,subject_id,study_id,ViewPosition", "a-1,10,50,PA")
    ),
    "jpg/mimic-cxr-2.0.0-chexpert.csv.gz": gzip.compress(lines("subject_id,study_id,Edema", "10,50,1.0")),
    "cxr/files/p10/p10/s50.txt": b"FINDINGS: clear.",
}
STUDY = {"study": "a", "source": "x", "patient": "p", "image": {"t1": "a/t1.nii.gz", "flair": "a/f.nii.gz"},
         "label": "a/seg.nii.gz"}  # fmt: skip


def mimic(table):
    path = f"jpg/mimic-cxr-2.0.0-{table}.csv.gz"
    others = {name: data for name, data in MIMIC.items() if name != path}
    return Kind(
        path, gzip.decompress(MIMIC[path]), lambda path: find_mimic(Tree(path.parents[1])), others, gzip.compress
    )


def root_of(find, depth=0):
    return lambda path: find(Tree(path.parents[depth]))


def genotypes(path):
    found = open_genotypes(str(path.with_name("g")))
    return found.counts()


def run_length(path):
    code = path.read_bytes().decode(errors="replace")
    return decode_runs([code], (4, 4)), decode_runs([code, "-1"], (1000, 1000))


def answers(path):
    text = path.read_bytes().decode(errors="replace")
    return accepted_answers(text), normalised_answer(text), accepted_answers(None)


def reports(root):
    return [open_i_text(study.text, part) for study in find_open_i(root) for part in ("full", "findings_impression")]


COVID = lines(
    "patientid,offset,view,modality,folder,filename,finding,clinical_notes",
    '1,2,PA,X-ray,images,a.png,Pneumonia/Viral/COVID-19,"one, two"',
    "2,,AP,X-ray,images,b.png,todo,",
)
MANIFEST = lines("image,text,subject,split,view,age", 'a.png,"one, two",p1,train,PA,5', ",x,p2,,,")
MANIFEST_LINES = lines(
    '{"image": "a.png", "text": "one", "subject": 9007199254740993}',
    '{"image": null, "text": "x", "subject": 1.5, "age": [1]}',
)
DATALIST = json.dumps({"training": [STUDY], "validation": [STUDY | {"study": "b"}]}).encode()
MARKSHEET = lines("patient_id,study_id,lesion_GS,case_csPCa", '1,2,"3+4, N/A",YES', "1,3,,")
NIH = lines("Image Index,Finding Labels,Patient ID", "a.png,Mass|Edema,1", "b.png,No Finding,2")
CHEXPERT = lines("Path,Frontal/Lateral,Edema", "CheXpert-v1.0/train/patient00001/study1/v.jpg,Frontal,-1.0")
RSNA = lines("patientId,x,Target", "a-1,,0", "a-2,3.0,1")
RFMID = lines("ID,Disease_Risk,DR,MH", "1,1,1,0", "2,0,0,0")
GRADES = lines("TCGA ID,Grade", "TCGA-00-0001,2.0", "TCGA-00-0002,3")
PHENOTYPES = lines("eid,31-0.0,21022-0.0,21001-0.0,20116-0.0,4080-0.0,4079-0.0", "1,1,50,25,2,140,80", "2,0,60,,-3,,")
OMICS = lines(",case_id,slide_id,age,IDH_mut,A_cnv", "0,TCGA-00-0001,x,50,1,0.5", "1,TCGA-00-0002,y,60,0,-1")
SOURCE = LabelSource({"control": ["2"], "ASD": ["1"]}, table="Pheno*.csv", key="SUB_ID", column="DX_GROUP", ids="pad")
CAPTIONS = "test/radiology/captions.txt"
LINKS = "ROCO_00001\twget -r ftp://x/PMC1.tar.gz -O a.tar.gz\tfig-1.jpg"
REFERENCES = {"roco_image_id": "PMC1_fig-1.jpg", "gorc_references": ["It shows a heart."]}
ROCO = {"test/radiology/dlinks.txt": lines(LINKS), "test/radiology/images/ROCO_00001.jpg": b"",
        CAPTIONS: lines("ROCO_00001\t A large heart. "),
        "roco_test_references.jsonl": lines(json.dumps(REFERENCES))}  # fmt: skip
MED = "ImageClef-2019-VQA-Med-Training/QAPairsByCategory/C1_Modality_train.txt"


def roco(path):
    return Kind(path, ROCO[path], root_of(find_roco, path.count("/")), {k: v for k, v in ROCO.items() if k != path})


KINDS = {
    "manifest": Kind("manifest.csv", MANIFEST, root_of(find_table)),
    "manifest, JSON lines": Kind("manifest.jsonl", MANIFEST_LINES, root_of(find_table)),
    "manifest, Parquet": Kind("manifest.parquet", parquet(), root_of(find_table)),
    "cases.csv": Kind(
        "cases.csv",
        lines("case_id,patient_id,split,disease", "c1,p1,train,copd", "c2,p2,val,"),
        root_of(find_cases),
        {"c1/t1.nii.gz": b"", "c2/t1.nii.gz": b""},
    ),
    "COVID metadata": Kind(
        "metadata.csv", COVID, lambda p: (find_covid(Tree(p.parent)), CovidFindings().find(Tree(p.parent)))
    ),
    "datalist": Kind("datalist.json", DATALIST, root_of(find_datalist)),
    "datalist, published": Kind(
        "dataset_X.json", b'{"training": [{"image": ["a/a_t1.nii.gz", "a/a_t2.nii.gz"]}]}', root_of(find_datalist)
    ),
    "PGS": Kind("s.txt", PGS, lambda path: (read_score(path), read_score(path, "GRCh38"))),
    "PGS, inside gz": Kind("s.txt.gz", PGS, read_score, wrap=gzip.compress),
    "PGS, gz itself": Kind("s.txt.gz", PACKED, read_score),
    "sscore": Kind("s.sscore", SSCORE, read_score_table),
    "burden": Kind("b.h5", b"", read_burden, {"b_iid.txt": b"1\n2\n", "b_colnames.txt": b"x\ny\nz\n"}),
    "burden names": Kind(
        "b_iid.txt",
        b"1\n2\n",
        lambda path: read_burden(path.with_name("b.h5")),
        {"b.h5": b"", "b_colnames.txt": b"x\ny\nz\n"},
    ),
    "BIM": Kind("g.bim", BIM, genotypes, TRIPLE),
    "FAM": Kind("g.fam", FAM, genotypes, TRIPLE),
    "BED": Kind("g.bed", TRIPLE["g.bed"], genotypes, TRIPLE),
    "run length": Kind("code.txt", b"1 2 3 4", run_length),
    "run lengths": Kind(
        "train-rle.csv",
        lines("ImageId, EncodedPixels", "1.2.1, -1", "1.2.2, 5 2 2 3"),
        root_of(SIIMPneumothorax().find),
    ),
    "ancestry": Kind("ancestry.tsv", lines("IID\tEUR\tAFR", "1\t0.999\t0", "2\t0.5\t0.5"), root_of(european)),
    "quality list": Kind(
        "left/qc_paths_left.txt",
        lines("a/1_21015_0_0.png", "2_21015_0_0.png"),
        root_of(find_ukb, 1),
        {"1_21015_0_0.png": b""},
    ),
    "JSON lines": Kind("f.jsonl", lines(json.dumps(FIGURE), json.dumps(FIGURE)), read_figures),
    "XML": Kind("ecgen-radiology/1.xml", XML, root_of(reports, 1)),
    "XML, inside tgz": Kind("NLMCXR_reports.tgz", XML, root_of(reports), wrap=tgz),
    "XML, tar inside gz": Kind("NLMCXR_reports.tgz", gzip.decompress(tgz(XML)), root_of(reports), wrap=gzip.compress),
    "XML, tgz itself": Kind("NLMCXR_reports.tgz", tgz(XML), root_of(reports)),
    "answers": Kind("answer.txt", b"The (left) lung, 2.5 cm#two", answers),
    "VQA-RAD": Kind("trainset.json", json.dumps([QUESTION] * 2).encode(), root_of(find_vqa_rad), {"images/a.jpg": b""}),
    "SLAKE": Kind("train.json", json.dumps([SLAKE]).encode(), root_of(find_slake), {"imgs/x/a.jpg": b""}),
    "VQA-Med": Kind(
        MED,
        lines("a|what is it?|ct#ct scan"),
        root_of(find_vqa_med, 2),
        {"ImageClef-2019-VQA-Med-Training/Train_images/a.jpg": b""},
    ),
    "split file": Kind(
        "split.csv",
        SPLIT,
        lambda path: [
            assign_splits(CASES, (0.5, 0.25, 0.25), 0, SplitFile(str(path), rule, "ignore"))
            for rule in ("exact", "pad")
        ],
    ),
    "split lists": Kind("l.txt", lines("0001 x", "a/0002.png"), lambda path: listed_split(CASES, [path] * 3)),
    "labels": Kind("labels.csv", LABELS, root_of(LabelledTable(["fluid"]).find)),
    "any table": Kind("t.csv", LABELS, read_table),
    "table in zip": Kind("t.csv.zip", zipped(LABELS), read_table),
    "marksheet": Kind("m.csv", MARKSHEET, read_marksheet),
    "phenotypic": Kind(
        "Pheno.csv",
        lines("SUB_ID,DX_GROUP", "1,1", "2,2", "0003,1", "4,-9999"),
        lambda path: read_classes(CASES, SOURCE, label_tables(SOURCE, Tree(path.parent))),
    ),
    "MIMIC metadata": mimic("metadata"),
    "MIMIC splits": mimic("split"),
    "MIMIC findings": mimic("chexpert"),
    "NIH": Kind(
        "Data_Entry_2017.csv",
        NIH,
        root_of(NIHChestXray14().find),
        {"train_val_list.txt": b"a.png\n", "test_list.txt": b"b.png\n"},
    ),
    "RSNA": Kind("stage_2_train_labels.csv", RSNA, root_of(RSNAPneumonia().find)),
    "CheXpert": Kind(
        "train.csv",
        CHEXPERT,
        root_of(CheXpert(classes=["Edema"]).find),
        {"valid.csv": lines("Path,Edema", "CheXpert-v1.0/valid/patient2/study1/v.jpg,0.0")},
    ),
    "APTOS": Kind("train.csv", lines("id_code,diagnosis", "a1,0", "b2,4"), root_of(APTOS2019().find)),
    "RFMiD": Kind("RFMiD_Training_Labels.csv", RFMID, root_of(RFMiD().find)),
    "MELINDA": Kind(
        "train.csv",
        lines("figure_file,caption,p_meth_label", 'a.png,"one, two",x'),
        root_of(read_melinda),
        {"melinda_images/a.png": b""},
    ),
    "ROCO captions": roco(CAPTIONS),
    "ROCO links": roco("test/radiology/dlinks.txt"),
    "ROCO references": roco("roco_test_references.jsonl"),
    "phenotypes": Kind("phenotypes.csv", PHENOTYPES, read_phenotypes),
    "grades": Kind(
        "grade_data.csv",
        GRADES,
        root_of(TCGAGrade().find),
        {"all_st/TCGA-00-0001-x_1.png": b""},
    ),
    "omics": Kind("all_dataset.csv", OMICS, root_of(read_omics)),
    "kinship": Kind("k.tsv", lines("#IID1 IID2 HETHET KINSHIP", "1 2 0.1 0.25", "1 3 0.1 nan"), read_kinship),
    "covariates": Kind("c.csv", lines("IID,sex,age", "1,0,50", "2,1,"), lambda path: _covariates(str(path))),
}


def _row_grown(draw, data, start, end, token):
    rows = data.split(b"\n")
    row = draw(st.integers(0, len(rows) - 1))
    grown = rows[row] + draw(st.sampled_from([b",", b",x", b"\t1", b'"', b" 1"]))
    return b"\n".join([*rows[:row], grown, *rows[row:]])


def _cell_replaced(draw, data, start, end, token):
    found = list(_CELL.finditer(data))
    if not found:
        return data + token
    cell = found[draw(st.integers(0, len(found) - 1))]
    return data[: cell.start()] + token + data[cell.end() :]


def _bit_flipped(draw, data, start, end, token):
    return data[:start] + bytes([value ^ (1 << draw(st.integers(0, 7))) for value in data[start : start + 1]]) + (
        data[start + 1 :]
    )  # fmt: skip


WAYS = [
    _row_grown,
    *[_cell_replaced] * 5,
    *[_bit_flipped] * 2,
    lambda draw, data, start, end, token: data[:start] + token + data[start:],
    lambda draw, data, start, end, token: data[:start] + token + data[end:],
    lambda draw, data, start, end, token: data[:end] + data[start:end] * draw(st.integers(1, 3)) + data[end:],
    lambda draw, data, start, end, token: data[:start],
    lambda draw, data, start, end, token: data.decode("latin-1").encode(
        draw(st.sampled_from(["utf-16", "utf-16-le", "utf-8-sig"]))
    ),
    lambda draw, data, start, end, token: draw(st.binary(max_size=60)),
]


@st.composite
def damaged(draw, sound):
    """Damage bytes in one to four ways."""
    data = sound
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        data = draw(st.sampled_from(WAYS))(draw, data, start, end, draw(st.sampled_from(TOKENS)))
    return data


def refusal(kind, path, data):
    """Read a damaged file, and return the sentence that refuses it; None where it was read."""
    path.write_bytes(data if kind.wrap is None else kind.wrap(data))
    try:
        kind.read(path)
    except (UserError, ImageError) as error:
        return str(error)
    return None


def laid_out(kind, root):
    """Write what a kind needs besides itself, and return its path."""
    for name, data in kind.others.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(hdf5() if name.endswith(".h5") else data)
    path = root / kind.path
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def sound_bytes(kind):
    return hdf5() if kind.path.endswith(".h5") else kind.sound


@pytest.mark.parametrize("name", KINDS)
def test_sound_originals_are_read(name, tmp_path):
    kind = KINDS[name]
    assert refusal(kind, laid_out(kind, tmp_path), sound_bytes(kind)) is None


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_read_or_refused_in_one_sentence(name, tmp_path):
    kind = KINDS[name]
    path = laid_out(kind, tmp_path)
    counts = {True: 0, False: 0}

    @seed(0)
    @settings(max_examples=INPUTS, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate, Phase.shrink])  # fmt: skip
    @given(damaged(sound_bytes(kind)))
    def run(data):
        sentence = refusal(kind, path, data)
        counts[sentence is not None] += 1
        if sentence is not None:
            shown = sentence.replace(str(path), path.name).replace(str(tmp_path), "ROOT")
            assert "\n" not in shown
            assert len(shown) <= 300, shown

    run()
    print(f"fuzz: {name}: {sum(counts.values())} inputs, {counts[True]} refused, no traceback")


KNOWN = [
    ("burden", b"array([[b'a', b'b']], dtype='|S1')"),
    ("cases.csv", "case_id,patient_id,split\nc1,p1,é\n".encode("latin-1")),
    ("COVID metadata", COVID.replace(b"clinical_notes", b"n\xe9s")),
    ("datalist", b'{"training":[{"image":5}]}'),
    ("datalist", b'{"training":[{"image":{"t1":5}}],"validation":{"a":1}}'),
    ("PGS", PGS.replace(b"\t100\t", b"\t1e400\t")),
    ("PGS", PGS.replace(b"\t0.5\t", b"\t1e400\t")),
    ("PGS, gz itself", PACKED[:60] + b"\0\0\0" + PACKED[63:]),
    ("BIM", BIM.replace(b"\t100\t", b"\t1e400\t")),
    ("run length", b"9" * 5000 + b" 1"),
    (
        "sscore",
        b"IID IID SCORE1_AVG\n1 2 0.5\n2 2 0.1\n",
    ),
    ("sscore", SSCORE.replace(b"SCORE1_AVG", b"IID")),
    ("quality list", b"\xff\0\n"),
    ("ancestry", b"IID\tEUR\n\xe9\t1\n"),
]


@pytest.mark.parametrize(("name", "data"), KNOWN)
def test_inputs_that_broke_a_reader(name, data, tmp_path):
    """Small relatives of what fuzzing had found."""
    kind = KINDS[name]
    refusal(kind, laid_out(kind, tmp_path), data)
