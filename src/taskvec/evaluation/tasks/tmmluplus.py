"""TMMLU+: examination questions in Traditional Chinese, 66 subjects, four choices.

The choices stand in the prompt with their letters, and the letters are compared by likelihood.
Data are the CSV files of the test questions, one a subject: the hub has a configuration for each,
so download its `data` folder and give it as local files. A file of another subject is asked with
its own name as the subject.

Source: Tam et al., arXiv:2403.01858; lm-evaluation-harness, task `tmmluplus`.
"""

from __future__ import annotations

from taskvec.errors import DataError
from taskvec.evaluation.data import DataFile, DataRow
from taskvec.evaluation.task import (
    Metric,
    Replies,
    RowsByRole,
    Sample,
    SampleSettings,
    Score,
    Task,
    each,
)
from taskvec.evaluation.tasks.choice import ENTROPY, choice_sample, choice_score
from taskvec.evaluation.tasks.shared import nonblank_text, refuse_shots

LETTERS = "ABCD"
PROMPT = (
    "以下為{subject}的單選題，請提供正確答案的選項。\n\n"
    "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"
)


def _samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
    refuse_shots("tmmluplus", settings)
    counts: dict[str, int] = {}
    samples = []
    for row in rows["test"]:
        subject = row.file.removesuffix("_test")
        number = counts.setdefault(subject, 0)
        counts[subject] += 1
        samples.append(_sample(f"{subject}/{number}", subject, row))
    return samples


def _sample(name: str, subject: str, row: DataRow) -> Sample:
    answer = row.text("answer").strip()
    if answer not in tuple(LETTERS):
        raise DataError(f"{row.where}: 'answer' must be one of A, B, C, D; got {answer!r}")
    prompt = PROMPT.format(
        subject=SUBJECTS.get(subject, subject),
        question=nonblank_text(row, "question").strip(),
        **{letter: row.text(letter) for letter in LETTERS},
    )
    return choice_sample(name, prompt, LETTERS, LETTERS.index(answer))


def _score(sample: Sample, replies: Replies) -> Score:
    scored = choice_score(sample, replies)
    notes = {"chosen": scored.notes["chosen"], "subject": sample.id.rpartition("/")[0]}
    values = {name: scored.values[name] for name in ("accuracy", ENTROPY.name)}
    return Score(values, notes)


SUBJECTS = {
    "accounting": "會計學",
    "administrative_law": "行政法",
    "advance_chemistry": "化學",
    "agriculture": "農業",
    "anti_money_laundering": "洗錢防制",
    "auditing": "審計學",
    "basic_medical_science": "基礎醫學",
    "business_management": "企業管理",
    "chinese_language_and_literature": "國文",
    "clinical_psychology": "臨床心理學",
    "computer_science": "資訊工程",
    "culinary_skills": "餐旅",
    "dentistry": "牙醫學",
    "economics": "經濟學",
    "education": "教育常識",
    "education_(profession_level)": "教育專業",
    "educational_psychology": "教育心理",
    "engineering_math": "工程數學",
    "finance_banking": "金融與法規",
    "financial_analysis": "財務分析",
    "fire_science": "火災學",
    "general_principles_of_law": "法學大意",
    "geography_of_taiwan": "台灣地理",
    "human_behavior": "人類行為與社會",
    "insurance_studies": "保險學",
    "introduction_to_law": "法律概論",
    "jce_humanities": "指考人文科目",
    "junior_chemistry": "國中理化",
    "junior_chinese_exam": "國中會考基測國文",
    "junior_math_exam": "國中會考基測數學科",
    "junior_science_exam": "國中會考基測自然科",
    "junior_social_studies": "國中會考基測社會科",
    "linear_algebra": "線代",
    "logic_reasoning": "邏輯思維",
    "macroeconomics": "總經",
    "management_accounting": "管理會計",
    "marketing_management": "行銷管理",
    "mechanical": "機械與機電概論",
    "music": "音樂科",
    "national_protection": "軍事",
    "nautical_science": "航海",
    "occupational_therapy_for_psychological_disorders": "心理障礙職能治療學",
    "official_document_management": "機關文書",
    "optometry": "視光學",
    "organic_chemistry": "有機化學",
    "pharmacology": "藥理學",
    "pharmacy": "藥劑學",
    "physical_education": "體育",
    "physics": "物理",
    "politic_science": "政治",
    "real_estate": "房地產",
    "secondary_physics": "高中物理",
    "statistics_and_machine_learning": "統計與機器學習",
    "taiwanese_hokkien": "閩南語",
    "taxation": "稅務",
    "technical": "技術工相關",
    "three_principles_of_people": "三民主義",
    "trade": "貿易",
    "traditional_chinese_medicine_clinical_medicine": "中醫臨床醫學",
    "trust_practice": "信託實務",
    "ttqav2": "台灣在地用語",
    "tve_chinese_language": "統測國文",
    "tve_design": "統測 設計",
    "tve_mathematics": "統測數學",
    "tve_natural_sciences": "統測自然科",
    "veterinary_pathology": "獸醫病理學",
    "veterinary_pharmacology": "獸醫藥理學",
}

TASKS = (
    Task(
        name="tmmluplus",
        summary="examination questions in Traditional Chinese, four choices",
        files=(DataFile("test", ("tmmluplus/*_test.csv", "tmmluplus/data/*_test.csv")),),
        samples=_samples,
        score=each(_score),
        metrics=(Metric("accuracy"), ENTROPY),
        fewest_tokens=512,
        source="Tam et al., arXiv:2403.01858; lm-evaluation-harness, task tmmluplus",
    ),
)
