import pytest

from common.errors import DataError
from datamodules.labelled.covid import CovidFindings

HEADER = "patientid,finding,view,modality,folder,filename,clinical_notes\n"
TABLE = f"""{HEADER}1,COVID-19,PA,X-ray,images,a.png,"Fever  and
 Cough"
1,"COVID-19, ARDS",AP Supine,X-ray,images,b.jpg,fever and cough
2,Streptococcus,AP,X-ray,images,c.png,
2,Streptococcus,L,X-ray,images,d.png,
3,Pneumocystis,pa,X-ray,images,e.png,x
,todo,PA,X-ray,images,f.png,
4,No Finding,PA,X-ray,images,g.png,
5,COVID-19,PA,CT,images,h.png,
6,COVID-19,PA,X-ray,volumes,i.nii.gz,
"""


def write(root, text=TABLE):
    (root / "metadata.csv").write_text(text)
    return root


def labels(root, task="covid", **options):
    return {image.case_id: image.targets for image in CovidFindings(task, **options).find(root)}


def of_findings(root, task, findings):
    """Return the label of each finding that has one."""
    rows = "".join(f'{n},"{finding}",PA,X-ray,images,{n}.png,\n' for n, finding in enumerate([*findings, "COVID-19"]))
    found = labels(write(root, HEADER + rows), task)
    return [found.get(f"{n}.png", (None,))[0] for n in range(len(findings))]


def test_images_of_covid(tmp_path):
    first, second, third, _ = CovidFindings().find(write(tmp_path))
    assert first == ("a.png", "1", tmp_path / "images/a.png", (1.0,), None, "fever and cough", ())
    assert second[1:6] == ("1", tmp_path / "images/b.jpg", (1.0,), None, "fever and cough")
    assert (third.patient_id, third.targets, third.group) == ("2", (0.0,), "")
    assert labels(tmp_path) == {"a.png": (1,), "b.jpg": (1,), "c.png": (0,), "e.png": (0,)}
    assert labels(tmp_path, "viral") == {"a.png": (1,), "b.jpg": (1,), "c.png": (0,)}
    assert labels(tmp_path, views=["l", "AP"]) == {"c.png": (0,), "d.png": (0,)}
    assert (CovidFindings().classes, CovidFindings("viral").classes) == (("COVID-19",), ("viral",))


def test_findings_of_covid(tmp_path):
    spelt = ["Pneumonia/Viral/COVID-19", "COVID-19, ARDS", "Pneumonia/Viral/SARS", "Pneumonia", "Tuberculosis"]
    assert of_findings(tmp_path, "covid", [*spelt, "Unknown", "No Finding", ""]) == [1, 1, 0, 0, 0, None, None, None]


def test_findings_of_viruses_and_bacteria(tmp_path):
    viral = ["COVID-19, ARDS", "SARS", "Varicella", "Pneumonia/Viral/MERS-CoV", "Pneumonia/Viral/Influenza/H1N1",
             "Pneumonia/Viral/Herpes "]  # fmt: skip
    bacterial = ["Streptococcus", "Mycoplasma Bacterial Pneumonia", "Pneumonia/Bacterial/E.Coli", "Legionella",
                 "Pneumonia/Bacterial/Staphylococcus/MRSA", "Bacterial"]  # fmt: skip
    others = ["Pneumonia", "ARDS", "Pneumocystis", "Pneumonia/Fungal/Aspergillosis", "Lipoid", "Viral and Bacterial",
              "Haemophilus influenzae"]  # fmt: skip
    assert of_findings(tmp_path, "viral", viral) == [1.0] * len(viral)
    assert of_findings(tmp_path, "viral", bacterial) == [0.0] * len(bacterial)
    assert of_findings(tmp_path, "viral", others) == [None] * len(others)


def test_old_headers(tmp_path):
    write(tmp_path, "Patientid,finding,view,modality,filename, url,clinical notes\n7,SARS,PA,X-ray,s.png,u,A  note\n")
    assert CovidFindings().find(tmp_path) == [("s.png", "7", tmp_path / "images/s.png", (0.0,), None, "a note", ())]


def test_a_file_with_several_rows_is_one_image_and_its_patients_are_one(tmp_path):
    rows = """8,SARS,PA,X-ray,images,p.png,
9,SARS,L,X-ray,images,side.png,
10,SARS,PA,X-ray,images,q.png,
10,SARS,L,X-ray,images,side.png,
9,SARS,PA,X-ray,images,p.png,note
,SARS,PA,X-ray,images,r.png,
"""
    images = CovidFindings().find(write(tmp_path, HEADER + rows))
    assert [(image.case_id, image.patient_id, image.group) for image in images] == [
        ("p.png", "8", "note"),
        ("q.png", "8", ""),
        ("r.png", "r.png", ""),
    ]
    write(tmp_path, HEADER + rows.replace("9,SARS,PA", "9,COVID-19,PA"))
    with pytest.raises(DataError, match=r"lists p\.png with findings that disagree, such as COVID-19"):
        CovidFindings().find(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE.replace("finding", "diagnosis"), "has no column finding; it has patientid, diagnosis, view, modality"),
        (TABLE.replace("c.png", "../c.png"), r"names the image '\.\./c.png', which does not lie in .*images"),
        (HEADER, "the task covid; the views of its X-rays are none"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        CovidFindings().find(write(tmp_path, text))


def test_no_image_of_the_views(tmp_path):
    with pytest.raises(
        DataError, match=r"no X-ray of the views LL with a finding of the task covid; the views of its .* L \(1\)"
    ):
        CovidFindings(views=["LL"]).find(write(tmp_path))


def test_another_root_and_another_task(tmp_path):
    with pytest.raises(DataError, match=r"holds no metadata.csv, so it is not COVID-19 image data collection \(ROOT/"):
        CovidFindings().find(tmp_path)
    with pytest.raises(ValueError, match="`task` must be one of covid, viral, got 'flu'"):
        CovidFindings("flu")


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("task", "views", "counts"),
    [
        ("covid", ["PA", "AP", "AP Supine"], (132, 77, 82)),
        ("covid", ["PA", "AP", "AP Supine", "L"], (158, 79, 91)),
        ("viral", ["PA", "AP", "AP Supine"], (113, 62, 87)),
    ],
)
def test_the_real_collection(real_data, task, views, counts):
    images = CovidFindings(task, views).find(real_data("covid_cxr"))
    patients = {image.patient_id for image in images}
    assert (len(images), len(patients), sum(image.targets[0] for image in images)) == counts
    assert all(image.image.is_file() and image.group for image in images)
